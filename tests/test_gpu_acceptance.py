"""benchmarks/gpu_acceptance.py and gpu_report.py without a GPU: stages that hang, fail or are cut, what is kept of
them, and the parsers on output in the real tools' formats."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu_acceptance
import gpu_report
from acceptance import build, places, process, profile_output, results, sanitizer_output, stages, suite, tables, wheels

ROOT = Path(__file__).resolve().parent.parent
# What a stage of these tests begins with: it emits, and knows what an earlier run has of it.
PREAMBLE = f"""
import os, signal, subprocess, sys, time
sys.path.append({str(ROOT / "benchmarks")!r})
from acceptance.results import Skip, already, emit, emit_skip, is_done
"""


def source(text: str) -> list[str]:
    return [sys.executable, "-c", PREAMBLE + textwrap.dedent(text)]


@pytest.fixture
def expires(monkeypatch, tmp_path):
    """A process's time is over when it has made the file of this name, however slow the machine."""
    ready = tmp_path / "ready"

    class Popen(subprocess.Popen):
        expired = False

        def wait(self, timeout: float | None = None) -> int:
            if timeout is None or self.expired:
                return super().wait(timeout)
            while not ready.exists() and self.poll() is None:
                time.sleep(0.02)
            if self.poll() is not None:
                return super().wait()
            ready.unlink()
            self.expired = True
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(process, "_GRACE", 0.3)
    return f"open({str(ready)!r}, 'w').close()"


# ---- a stage's process -----------------------------------------------------------------------------------------------


def run_process(tmp_path: Path, text: str, limit: float = 60) -> tuple[process.Ended, dict[str, Any], str]:
    found: dict[str, Any] = {}
    ended = process.run(source(text), limit, tmp_path / "log.txt", dict(os.environ), found.__setitem__)
    return ended, found, (tmp_path / "log.txt").read_text()


def test_process_says_what_it_found(tmp_path):
    ended, found, log = run_process(tmp_path, "emit('a', {'ok': True}); print('said'); emit('b', [1, 2.5, None])")
    assert ended[:2] == ("ok", "") and found == {"a": {"ok": True}, "b": [1, 2.5, None]}
    assert log == "said\n"


def test_process_emits_more_than_a_pipe_holds(tmp_path):
    _, found, _ = run_process(tmp_path, "emit('long', 'x' * 1_000_000)")
    assert found == {"long": "x" * 1_000_000}


@pytest.mark.parametrize(("text", "reason"), [("sys.exit(3)", "exit status 3"), ("os.abort()", "ended by SIGABRT")])
def test_process_that_fails(tmp_path, text, reason):
    ended, found, _ = run_process(tmp_path, f"emit('before', 1); {text}")
    assert ended[:2] == ("failed", reason) and found == {"before": 1}


def test_process_that_is_skipped(tmp_path):
    assert run_process(tmp_path, "emit_skip('no such tool')")[0][:2] == ("skipped", "no such tool")


def test_process_that_hangs_is_ended_with_all_it_started(tmp_path, expires):
    """Also what ignores a polite request; what it had said stays."""
    text = f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
        emit('child', child.pid)
        print('hanging', flush=True)
        {expires}
        time.sleep(600)
    """
    ended, found, log = run_process(tmp_path, text, limit=20)
    assert ended[:2] == ("timeout", "cut at its limit of 20 s") and log == "hanging\n"
    deadline = time.monotonic() + 60
    while _lives(found["child"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(found["child"])


def _lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


# ---- the script ------------------------------------------------------------------------------------------------------

MACHINE = {"device": "Fake 100", "capability": [9, 0], "python": "3", "torch_cuda": "13", "packages": {"torch": "2"}}


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Runs gpu_acceptance.py in this process with stages of the test's own: their source, by name. The machine is a
    fake one with a build."""
    machine = dict(MACHINE)
    monkeypatch.setattr(gpu_acceptance.Run, "_machine", lambda self: dict(machine))
    monkeypatch.setattr(places, "is_up_to_date", lambda: True)
    monkeypatch.setattr("acceptance.facts.clocks", dict)
    before = signal.getsignal(signal.SIGTERM)

    def run(sources: dict[str, str], *arguments: str, **limits: int) -> int:
        table = [stages.Stage(name, "none", limits.get(name, 300), 20, "a test's") for name in sources]
        monkeypatch.setattr(stages, "STAGES", table)
        monkeypatch.setattr(stages, "BY_NAME", {stage.name: stage for stage in table})
        monkeypatch.setattr(gpu_acceptance, "stage_command", lambda name: source(sources[name]))
        return gpu_acceptance.main(["--out", str(tmp_path / "out"), *arguments])

    run.machine = machine
    yield run
    signal.signal(signal.SIGTERM, before)


def read(tmp_path: Path) -> dict[str, dict[str, Any]]:
    content = json.loads((tmp_path / "out" / "result.json").read_text())
    return {entry["stage"]: entry for entry in content["stages"]}


def test_stages_in_their_order_with_one_json_and_one_log(script, tmp_path, capsys):
    sources = {"build": "print('built'); emit('a', {'ok': True})", "smoke": "print('smoked')", "tests": ""}
    assert script(sources) == 0
    content = json.loads((tmp_path / "out" / "result.json").read_text())
    assert list(content)[:3] == ["format", "fake", "machine"] and content["machine"]["device"] == "Fake 100"
    entries = content["stages"]
    assert [(entry["stage"], entry["status"], entry["reason"]) for entry in entries] == [
        (name, "ok", "") for name in ("build", "smoke", "tests")
    ]
    assert all(entry["started"] and entry["seconds"] >= 0 for entry in entries)
    assert entries[0]["data"] == {"a": {"ok": True}}
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.index("built") < log.index("smoked")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "result.json"]
    assert "smoke: ok" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        ("sys.exit(1)", "exit status 1"),
        ("emit('x', {'ok': False}); emit('y', {'ok': True})", "1 failed: x"),
        ("emit('x', 1); raise ValueError('a mistake')", "exit status 1"),
    ],
)
def test_a_stage_that_fails_keeps_none_from_running(script, tmp_path, capsys, fails, reason):
    assert script({"build": fails, "smoke": "emit('z', 1)"}) == 1
    found = read(tmp_path)
    assert (found["build"]["status"], found["build"]["reason"]) == ("failed", reason)
    assert found["smoke"]["status"] == "ok" and found["smoke"]["data"] == {"z": 1}
    assert ("a mistake" in capsys.readouterr().out) == ("mistake" in fails)  # the end of its log is shown


def test_a_stage_that_hangs_is_cut_and_keeps_what_it_had(script, tmp_path, expires):
    hangs = f"emit('first', {{'ok': True}}); {expires}; time.sleep(600)"
    assert script({"build": hangs, "smoke": "emit('z', 1)"}, "--limit", "build=20") == 1
    found = read(tmp_path)
    assert (found["build"]["status"], found["build"]["reason"]) == ("timeout", "cut at its limit of 20 s")
    assert found["build"]["data"] == {"first": {"ok": True}}
    assert found["smoke"]["status"] == "ok"


def test_a_skipped_stage_is_no_failure(script, tmp_path):
    assert script({"sanitizer": "emit_skip('not here')", "smoke": ""}) == 0
    assert (read(tmp_path)["sanitizer"]["status"], read(tmp_path)["sanitizer"]["reason"]) == ("skipped", "not here")


def test_stages_option(script, tmp_path, capsys):
    sources = {"build": "", "smoke": "", "tests": ""}
    assert script(sources, "--stages", "tests,build") == 0
    assert list(read(tmp_path)) == ["build", "tests"]
    assert script(sources, "--stages", "tests,bild") == 2
    assert script(sources, "--limit", "bild=3") == 2
    assert capsys.readouterr().err.count("no such stage: bild; there are build, smoke, tests") == 2
    assert script(sources, "--limit", "build=soon") == 2


def test_minutes_cut_and_skip(script, tmp_path, monkeypatch):
    """By a clock that the test moves: the first stage gets what is left, the second does not fit."""
    now = [1000.0]
    monkeypatch.setattr(gpu_acceptance.time, "monotonic", lambda: now[0])
    given = []

    def run(command, limit, *rest):
        given.append(limit)
        now[0] += limit
        return process.Ended("timeout", "cut", limit)

    monkeypatch.setattr(process, "run", run)
    assert script({"build": "", "smoke": "", "tests": ""}, "--minutes", "2", build=100) == 1
    assert given == [100]  # of 115 s: its own limit; the others have fewer than the 20 s that they need
    found = read(tmp_path)
    assert [found[name]["status"] for name in ("build", "smoke", "tests")] == ["timeout", "skipped", "skipped"]
    assert found["smoke"]["reason"] == "needs at least 20 s, 15 s of --minutes are left"
    given.clear()
    assert script({"build": "", "smoke": ""}, "--minutes", "2", build=30) == 1
    assert given == [30, 85]


def test_resume_runs_what_is_not_ok(script, tmp_path):
    """What a cut stage had is kept and known to it; what failed is gone, until it is found again."""
    first = "emit('a', {'ok': True}); emit('b', {'ok': False}); emit('c', {'ok': None})"
    assert script({"build": "emit('n', 1)", "smoke": first, "tests": "emit_skip('none')"}) == 1
    seen = "emit('known', sorted(already('smoke'))); emit('a is done', is_done(already('smoke')['a']))"
    again = {"build": "emit('n', 2)", "smoke": seen, "tests": "emit('ran', True)"}
    assert script(again, "--resume") == 0
    found = read(tmp_path)
    assert found["build"]["data"] == {"n": 1}  # ok already
    assert found["smoke"]["data"]["known"] == ["a", "c"] and found["smoke"]["data"]["a is done"] is True
    assert "b" not in found["smoke"]["data"] and found["smoke"]["data"]["a"] == {"ok": True}
    assert found["tests"]["data"] == {"ran": True} and list(found) == ["build", "smoke", "tests"]


def test_resume_builds_again_on_another_machine(script, tmp_path, monkeypatch):
    assert script({"build": "emit('n', 1)", "smoke": ""}) == 0
    monkeypatch.setattr(places, "is_up_to_date", lambda: False)
    assert script({"build": "emit('n', 2)", "smoke": "emit('again', 1)"}, "--resume") == 0
    assert read(tmp_path)["build"]["data"] == {"n": 2} and read(tmp_path)["smoke"]["data"] == {}


def test_resume_after_the_script_itself_was_ended(tmp_path):
    """By the machine's own limit: what had been said is in the file, and the stage is not taken for ok."""
    script = tmp_path / "run.py"
    hangs = source("emit('first', {'ok': True}); time.sleep(600)")
    script.write_text(
        PREAMBLE
        + textwrap.dedent(f"""
        import gpu_acceptance
        from acceptance import places
        gpu_acceptance.Run._machine = lambda self: {MACHINE!r}
        places.is_up_to_date = lambda: True
        gpu_acceptance.stage_command = lambda name: {hangs!r}
        sys.exit(gpu_acceptance.main(['--stages', 'smoke', '--out', {str(tmp_path / "out")!r}]))
        """)
    )
    running = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if (tmp_path / "out" / "result.json").exists() and read(tmp_path).get("smoke", {}).get("data"):
            break
    assert read(tmp_path)["smoke"]["status"] == "running" and running.poll() is None
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=300)
    entry = read(tmp_path)["smoke"]
    assert running.returncode != 0
    assert (entry["status"], entry["reason"], entry["data"]) == ("failed", "interrupted", {"first": {"ok": True}})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"device": "Other 200"}, "device was Fake 100, is Other 200"),
        ({"packages": {"torch": "3"}}, "torch was 2, is 3"),
        ({"python": "4"}, "python was 3, is 4"),
    ],
)
def test_resume_refuses_numbers_of_another_machine(script, tmp_path, capsys, change, says):
    assert script({"smoke": "emit('n', 1)"}) == 0
    script.machine.update(change)
    assert script({"smoke": "emit('n', 2)"}, "--resume") == 2
    assert says in capsys.readouterr().err and read(tmp_path)["smoke"]["data"] == {"n": 1}


def test_resume_refuses_what_is_no_result(script, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_text("{}")
    assert script({"smoke": ""}, "--resume") == 2
    assert "is no result of gpu_acceptance.py" in capsys.readouterr().err


def test_results_of_a_dry_run_and_of_a_device_do_not_mix(script, tmp_path, capsys, monkeypatch):
    assert script({"smoke": ""}) == 0
    monkeypatch.setattr(places, "FAKE", True)
    assert script({"smoke": ""}, "--resume") == 2
    assert "is of a real device" in capsys.readouterr().err


def test_without_resume_an_older_result_is_kept_beside(script, tmp_path):
    assert script({"smoke": "emit('n', 1)"}) == 0
    assert script({"smoke": "emit('n', 2)"}) == 0
    (older,) = (tmp_path / "out").glob("result-*.json")
    assert json.loads(older.read_text())["stages"][0]["data"] == {"n": 1} and read(tmp_path)["smoke"]["data"] == {
        "n": 2
    }


def test_stages_need_a_build(script, monkeypatch, capsys):
    monkeypatch.setattr(places, "is_up_to_date", lambda: False)
    assert script({"build": "", "smoke": ""}, "--stages", "smoke") == 2
    assert "add build to --stages" in capsys.readouterr().err
    assert script({"build": "", "smoke": ""}) == 0


def test_no_device(tmp_path, monkeypatch, capsys):
    said = json.dumps(MACHINE | {"device": None})
    done = subprocess.CompletedProcess([], 0, said, "")
    monkeypatch.setattr(gpu_acceptance.subprocess, "run", lambda *args, **options: done)
    assert gpu_acceptance.main(["--out", str(tmp_path)]) == 2
    assert "torch sees no CUDA device here" in capsys.readouterr().err and not (tmp_path / "result.json").exists()


def test_help_names_the_stages(capsys):
    with pytest.raises(SystemExit):
        gpu_acceptance.main(["--help"])
    said = capsys.readouterr().out
    order = [said.rindex(f"\n  {stage.name} ") for stage in stages.STAGES]
    assert order == sorted(order)
    names = ["build", "doctor", "smoke", "tests", "bench", "linear", "sanitizer", "profile"]
    assert [stage.name for stage in stages.STAGES] == names


# ---- build -----------------------------------------------------------------------------------------------------------


def test_build_is_offline_and_for_one_architecture(monkeypatch):
    command = build.pip_command("90")
    assert {"--no-build-isolation", "--no-deps", "--no-index"} <= set(command)
    assert "cmake.define.CMAKE_CUDA_ARCHITECTURES=90-real" in command and "cmake.define.FASTLOSS_CUDA=ON" in command
    assert command[-1] == str(ROOT) and command[command.index("--target") + 1] == str(places.site())
    assert "cmake.define.FASTLOSS_CUDA=OFF" in build.pip_command(None)


@pytest.fixture
def emitted(monkeypatch):
    """What a stage that runs in this process hands over."""
    found: dict[str, Any] = {}
    for module in (build, suite):
        monkeypatch.setattr(module, "emit", found.__setitem__)
    return found


@pytest.fixture
def installs(monkeypatch, tmp_path):
    """pip writes files where it is told to; the architectures that the module then says."""
    said = ["90"]
    monkeypatch.setattr(places, "build_folder", lambda: tmp_path / "build")
    monkeypatch.setattr(build, "_architecture", lambda: "90")

    def pip(command, cwd):
        for path in places.native_modules():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return 0

    def ask(command, **options):
        return subprocess.CompletedProcess(command, 0, " ".join(said), "")

    monkeypatch.setattr(build.subprocess, "call", pip)
    monkeypatch.setattr(build.subprocess, "run", ask)
    return said


def test_build_knows_what_is_built(installs, emitted, monkeypatch):
    assert not places.is_up_to_date()
    assert build.build() == 0
    assert emitted["installed"]["ok"] and emitted["kernels"] == {"ok": True, "architectures": ["90"], "expected": "90"}
    assert places.is_up_to_date()
    assert places.environment()["PYTHONPATH"].split(os.pathsep)[0] == str(places.site())
    monkeypatch.setattr(places, "fingerprint", lambda: "of other sources")
    assert not places.is_up_to_date()
    assert str(places.site()) not in places.environment()["PYTHONPATH"].split(os.pathsep)


def test_build_for_another_architecture_has_failed(installs, emitted):
    installs[:] = ["80 90"]
    assert build.build() == 1 and emitted["kernels"]["ok"] is False


def test_build_names_what_is_missing(emitted, monkeypatch, capsys):
    monkeypatch.setattr(build, "find_spec", lambda name: None if name == "pybind11" else object())
    assert build.build() == 1
    assert emitted == {"missing": {"ok": False, "packages": ["pybind11"]}} and "--wheels" in capsys.readouterr().out


def _wheel(folder: Path, name: str, requires: str = "py3-none-any") -> Path:
    import zipfile

    path = folder / f"{name}-1.0-{requires}.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "here = True\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: {requires}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_wheels_that_are_missing_are_installed(tmp_path, monkeypatch):
    """Offline; a wheel for another Python keeps no other away, and what is installed stays as it is."""
    pytest.importorskip("pip")
    monkeypatch.setattr(places, "build_folder", lambda: tmp_path / "build")
    folder = tmp_path / "wheels"
    folder.mkdir()
    _wheel(folder, "wanted_here")
    _wheel(folder, "for_another", "cp27-none-any")
    _wheel(folder, "pytest")
    refused = wheels.install(folder)
    assert (places.tools() / "wanted_here.py").exists() and not (places.tools() / "pytest.py").exists()
    assert list(refused) == ["for_another-1.0-cp27-none-any.whl"] and "not a supported wheel" in next(
        iter(refused.values())
    )
    assert [wheel.name for wheel in wheels.missing(folder)] == ["for_another-1.0-cp27-none-any.whl"]
    assert wheels.install(tmp_path / "nowhere") == {str(tmp_path / "nowhere"): "there is no such folder"}


# ---- tests -----------------------------------------------------------------------------------------------------------

SUITE = """
import pytest
pytestmark = pytest.mark.gpu
def test_passes(): pass
def test_fails(): assert 1 == 2, "of the test's own"
@pytest.fixture
def broken(): raise RuntimeError("in its setup")
def test_error(broken): pass
@pytest.mark.skip(reason="two devices are needed")
def test_skips(): pass
"""


@pytest.fixture
def small_suite(tmp_path, monkeypatch, emitted):
    """The stage `tests` over a file of the test's own."""
    monkeypatch.setattr(places, "build_folder", lambda: tmp_path / "build")
    monkeypatch.setattr(suite, "build_folder", lambda: tmp_path / "build")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]))

    def run(text: str, **environment: str) -> int:
        (tmp_path / "test_small.py").write_text(text)
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
        monkeypatch.setenv("FASTLOSS_GPU_TESTS", f"{tmp_path / 'test_small.py'} -c {tmp_path / 'pytest.ini'} -n 0")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return suite.tests()

    return run


def test_suite_counts_and_keeps_messages(small_suite, emitted):
    assert small_suite(SUITE) == 1
    summary = emitted["summary"]
    assert [summary[name] for name in ("ok", "passed", "failed", "error", "skipped")] == [False, 1, 1, 1, 1]
    messages = {name.rpartition("::")[2]: message for name, message in summary["failures"].items()}
    assert "of the test's own" in messages["test_fails"] and messages["test_fails"].startswith("failure: ")
    assert "in its setup" in messages["test_error"] and messages["test_error"].startswith("error: ")
    assert summary["skip_reasons"] == {"two devices are needed": 1}
    assert {name.rpartition("::")[2] for name in summary["slowest_seconds"]} == {
        "test_passes", "test_fails", "test_error", "test_skips"
    }  # fmt: skip


def test_suite_without_a_test_is_no_success(small_suite, emitted):
    assert small_suite("def test_without_a_mark(): pass") == 1
    assert emitted["summary"]["ok"] is False and emitted["summary"]["passed"] == 0


def test_suite_that_passes(small_suite, emitted):
    assert small_suite("import pytest\n@pytest.mark.gpu\ndef test(): pass") == 0
    assert emitted["summary"]["ok"] is True and emitted["summary"]["passed"] == 1


def test_suite_is_interrupted_in_time_for_its_sum(small_suite, emitted, expires):
    """By the stage's limit: what had run is counted."""
    text = "import pytest, time\npytestmark = pytest.mark.gpu\ndef test_a(): pass\n"
    text += f"def test_b():\n    {expires}\n    time.sleep(600)"
    assert small_suite(text, FASTLOSS_GPU_END=str(time.time() + 600)) == 1
    assert emitted["summary"]["ok"] is False and "cut before" in emitted["summary"]["error"]
    assert emitted["summary"]["passed"] == 1


def test_plugin_hands_failures_over_as_they_come(tmp_path):
    """From the process that hears of all workers, each once."""
    pytest.importorskip("xdist")
    (tmp_path / "test_small.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    found: list[tuple[str, Any]] = []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "acceptance.reports", "-p", "no:cacheprovider", "-n", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    chosen = ["-c", str(tmp_path / "pytest.ini"), str(tmp_path / "test_small.py")]
    ended = process.run([*command, *chosen], 600, tmp_path / "log", environment, lambda *pair: found.append(pair))
    assert ended.status == "failed"
    failures = {name.rpartition("::")[2]: value for name, value in found if name.startswith("failure: ")}
    assert len([name for name, _ in found if name.startswith("failure: ")]) == 2
    assert "of the test's own" in failures["test_fails"]["message"] and failures["test_error"]["when"] == "setup"
    assert found[-1] == ("so far", {"passed": 1, "failed": 2, "skipped": 1})


def test_suite_of_a_device_is_all_tests_marked_gpu(tmp_path, monkeypatch):
    """With what is installed there: workers, a limit for each test."""
    monkeypatch.setattr(suite, "FAKE", False)
    monkeypatch.setattr(suite.os, "cpu_count", lambda: 16)
    for present, options in ((True, ["-n", "12", "--timeout", "120"]), (False, [])):
        monkeypatch.setattr(suite, "find_spec", lambda name, present=present: object() if present else None)
        command = suite.pytest_command(tmp_path / "junit.xml")
        assert command[-3:] == ["--junitxml", str(tmp_path / "junit.xml"), "tests"]
        assert command[command.index("-m", 3) + 1] == "gpu" and set(options) <= set(command)
        assert present == ("-n" in command) == ("--timeout" in command)


def test_bench_measures_each_case_once(tmp_path):
    """In two parts: plain bfloat16 first, with torch.compile; of the records what the device decides."""
    pytest.importorskip("psutil")
    from acceptance.bench import PARTS, command

    from fastloss.bench.cases import cases
    from fastloss.bench.records import RECORDS
    from fastloss.bench.resume import select

    table = cases(accelerator=True)
    chosen = [select(part.only, table, list(RECORDS)) for part in PARTS]
    measured = [case for of, _ in chosen for case in of]
    assert sorted(measured, key=table.index) == table and len(set(measured)) == len(measured)
    assert {(case.loss, case.dtype) for case in chosen[0][0]} == {("plain", "bfloat16")}
    assert chosen[0][1] == [] and set(chosen[1][1]) == set(RECORDS) - {"shared vocabulary", "import time"}
    first, second = (command(part, tmp_path) for part in PARTS)
    assert "--no-compile" not in first and "--no-compile" in second
    assert {"--resume", "--device", "cuda"} <= set(first) and "--quick" not in first


JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites name="pytest tests"><testsuite name="pytest" errors="0"
failures="1" skipped="1" tests="3" time="1.5" timestamp="2026-01-01T00:00:00" hostname="h"><testcase
classname="tests.test_losses" name="test_case[cuda:gpu-js]" time="0.50"><failure message="AssertionError: loss: 2e-2">
long text</failure></testcase>
<testcase classname="tests.test_losses" name="test_case[cuda:gpu-topk]" time="0.25" /><testcase
classname="tests.test_losses" name="test_nccl" time="0.0"><skipped type="pytest.skip" message="two devices">x</skipped>
</testcase></testsuite></testsuites>"""


def test_parse_junit():
    found = suite.parse_junit(JUNIT)
    assert found["failures"] == {"tests.test_losses::test_case[cuda:gpu-js]": "failure: AssertionError: loss: 2e-2"}
    assert [found[name] for name in ("ok", "passed", "failed", "error", "skipped")] == [False, 1, 1, 0, 1]
    assert found["slowest_seconds"]["tests.test_losses::test_case[cuda:gpu-js]"] == 0.5


# ---- the tools' output -----------------------------------------------------------------------------------------------

MEMCHECK = """========= COMPUTE-SANITIZER
family: plain, bfloat16
========= Invalid __global__ read of size 4 bytes
=========     at fastloss::cuda_float32::row_states(fastloss::StatesArgs)+0x2d0
=========     by thread (31,0,0) in block (3,0,0)
=========     Address 0x7f3a4b600000 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f3a4b5ff000 of size 4,096 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call.
=========     Host Frame: [0x2d6b3f]
=========
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at row_loss_grad(fastloss::LossGradArgs)+0x530
=========     and Read access at row_loss_grad(fastloss::LossGradArgs)+0x650 [12 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_parse_sanitizer():
    found = sanitizer_output.parse(MEMCHECK)
    assert found["errors"] == 2 and found["warnings"] == 0 and len(found["reports"]) == 2
    assert found["reports"][0].startswith(
        "Invalid __global__ read of size 4 bytes\nat fastloss::cuda_float32::row_states"
    )
    found = sanitizer_output.parse(RACECHECK)
    assert found["errors"] == 1 and "Race reported" in found["reports"][0]
    warned = "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n"
    assert sanitizer_output.parse(warned) == {"errors": 2, "warnings": 2, "reports": []}
    for summary in ("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"):
        clean = sanitizer_output.parse(f"========= COMPUTE-SANITIZER\n========= {summary}\n")
        assert clean == {"errors": 0, "warnings": 0, "reports": []}
    assert sanitizer_output.parse("========= COMPUTE-SANITIZER\nkilled")["errors"] is None


NCU_HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size",'
    '"Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def ncu_row(number: int, kernel: str, metric: str, value: str, unit: str = "") -> str:
    place = f'"{number}","963","python3.12","127.0.0.1","{kernel}","1","7","(256, 1, 1)","(4,096, 1, 1)","0","9.0"'
    return f'{place},"Command line profiler metrics","{metric}","{unit}","{value}"'


SPIN = "at::cuda::<unnamed>::spin_kernel(long)"
OURS = "void fastloss::cuda_bfloat16::row_loss_grad<(bool)0, (bool)1>(fastloss::LossGradArgs)"
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"


def test_parse_ncu():
    lines = [
        "==PROF== Connected to process 963 (/usr/bin/python3.12)",
        "family: plain, bfloat16",
        '==PROF== Profiling "row_loss_grad" - 1: 0%....50%....100% - 9 passes',
        "family: JS, bfloat16",
        "==PROF== Disconnected from process 963",
        NCU_HEADER,
        ncu_row(0, SPIN, "gpu__time_duration.sum", "1,500", "ns"),
        ncu_row(1, OURS, "gpu__time_duration.sum", "1,000,000", "ns"),
        ncu_row(1, OURS, "dram__bytes_read.sum", "2,000,000,000", "byte"),
        ncu_row(1, OURS, "dram__bytes_write.sum", "1,000,000,000.00", "byte"),
        ncu_row(1, OURS, STALLED.format("gmma"), "n/a"),
        ncu_row(1, OURS, STALLED.format("wait"), "0.25", "inst"),
        ncu_row(1, OURS, STALLED.format("long_scoreboard"), "7.5", "inst"),
        ncu_row(2, "fastloss::total(fastloss::TotalArgs)", "gpu__time_duration.sum", "2,048", "ns"),
        ncu_row(3, SPIN, "gpu__time_duration.sum", "1,500", "ns"),
        ncu_row(4, OURS, "gpu__time_duration.sum", "3,000,000", "ns"),
    ]
    kernels = profile_output.parse("\n".join(lines))
    assert len(kernels) == 5
    families = profile_output.in_families(kernels, ["plain, bfloat16", "JS, bfloat16"])
    first, total = families["plain, bfloat16"]
    assert first["kernel"] == "void fastloss::cuda_bfloat16::row_loss_grad<(bool)0, (bool)1>"
    assert first["grid"] == "(4,096, 1, 1)" and first["dram_gb_per_s"] == 3000.0
    assert list(first["stalls"].items()) == [("long_scoreboard", 7.5), ("wait", 0.25)]
    assert total["gpu__time_duration.sum"] == 2048 and "dram_gb_per_s" not in total
    assert [kernel["gpu__time_duration.sum"] for kernel in families["JS, bfloat16"]] == [3e6]
    assert profile_output.refusal("\n".join(lines)) is None


def test_ncu_that_may_not_read_counters():
    denied = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters"
    assert profile_output.refusal(f"==PROF== Connected\n{denied}\n") == denied
    assert "LibraryNotLoaded" in profile_output.refusal("==ERROR== Failed to initialize the profiler: LibraryNotLoaded")


# ---- the report ------------------------------------------------------------------------------------------------------


def a_result(fake: bool) -> dict[str, Any]:
    regimes = {"fastloss": "cuda", "fastloss, triton": "triton"}
    ratios = {name: {"share_of_floor": 0.875, "gb_per_s": 2718.0} for name in regimes}
    case = {
        "name": "forward+backward-plain-bfloat16-16384x32000", "fastloss": regimes, "ratios": ratios, "bytes": 1,
        "median_ms": {"fastloss": 1.234, "fastloss, triton": 1.345, "torch": 9.876, "floor": 1.08}, "skipped": {},
    }  # fmt: skip
    one = {"median_ms": 43.21, "peak_extra_bytes": 3 << 30, "loss": 11.7, "seconds": [0.04321]}
    kernel = {
        "kernel": "row_loss_grad", "gpu__time_duration.sum": 777000.0, "dram_gb_per_s": 2987.0,
        "sm__warps_active.avg.pct_of_peak_sustained_active": 61.5, "stalls": {"long_scoreboard": 7.5, "wait": 0.25},
    }  # fmt: skip
    ceilings = {"ok": True, "copy_gb_per_s": 3011.0, "matmul_tflop_per_s": 801.0}
    counts = {"ok": False, "passed": 640, "failed": 1, "error": 0, "skipped": 2, "failures": {"test_x": "y"}}
    table = {"cases": [case], "skipped": {"JS": "failed: KeyError"}}
    alternatives = {"fastloss, 6 GiB": one, "floor": {"median_ms": 32.1, "seconds": []}}
    swept = {"ok": True, "rounds": 9, "dtype": "bfloat16", "skipped": {"quack": "not installed"}}
    data = {
        "smoke": {"cuda: plain": {"ok": True}, "cuda: js": {"ok": False}, "ceilings": ceilings},
        "tests": {"summary": counts},
        "bench": {"table": table, "table: all measured": {"ok": False}},
        "linear": {"8192 x 4096 x 128256": swept | {"alternatives": alternatives}},
        "sanitizer": {"cuda: racecheck": {"ok": False, "errors": 1, "reports": ["Race reported"]}},
        "profile": {"cuda: V = 32000": {"ok": True, "by": "ncu", "families": {"plain, bfloat16": [kernel]}}},
    }
    entries = [
        {"stage": name, "started": "", "seconds": 1.0, "status": "ok", "reason": "", "data": value}
        for name, value in data.items()
    ]
    machine = MACHINE | {
        "device": "Fake 100 80GB",
        "nvidia_smi": {"driver_version": "580.1"},
        "date": "2026-12-01T00:00",
    }
    return {"format": results.FORMAT, "fake": fake, "machine": machine, "stages": entries}


@pytest.fixture
def result_file(tmp_path):
    def write(fake: bool) -> str:
        path = tmp_path / "result.json"
        path.write_text(json.dumps(a_result(fake)))
        return str(path)

    return write


def test_report_says_what_is_in_the_json(result_file, capsys):
    assert gpu_report.main([result_file(False), "--stdout"]) == 0
    said = capsys.readouterr().out
    for text in (
        "Fake 100 80GB, driver 580.1, torch 2", "| cuda | 1.23 | 9.88 |", "| triton | 1.34", "2718 GB/s", "0.875",
        "cuda: js", "3011 GB/s", "| pytest -m gpu | 641 | 1 | test_x |", "Race reported", "JS: failed: KeyError",
        "| fastloss, 6 GiB | 43.2 | 0.743 | 3072 |", "quack: not installed", "777 | 2987 | 61.5 | long_scoreboard 7.50",
    ):  # fmt: skip
        assert text in said, text
    assert "DRY RUN" not in said


def test_report_goes_between_the_markers(result_file, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(gpu_report, "DOCS", tmp_path / "docs")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "gpu.md"
    page.write_text(f"before\n{gpu_report.BEGIN}\nold\n{gpu_report.END}\nafter\n")
    assert gpu_report.main([result_file(False)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "2718 GB/s" in text
    for name in ("gpu_bench.png", "gpu_linear.png"):
        assert (tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in text
    assert gpu_report.main([result_file(False)]) == 0
    assert page.read_text() == text  # once, however often
    page.write_text("no markers\n")
    assert gpu_report.main([result_file(False)]) == 1
    assert page.read_text() == "no markers\n" and "markers" in capsys.readouterr().err


def test_report_of_a_dry_run_does_not_reach_the_documents(result_file, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(gpu_report, "DOCS", tmp_path / "docs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "gpu.md").write_text(f"{gpu_report.BEGIN}\n{gpu_report.END}\n")
    assert gpu_report.main([result_file(True)]) == 1
    assert "dry run" in capsys.readouterr().err and len(list((tmp_path / "docs").iterdir())) == 1
    assert gpu_report.main([result_file(True), "--out", str(tmp_path / "elsewhere")]) == 0
    assert "DRY RUN" in (tmp_path / "elsewhere" / "gpu.md").read_text()
    assert gpu_report.main([result_file(True), "--stdout"]) == 0
    assert gpu_report.main([str(tmp_path / "nothing.json")]) == 2


def test_report_of_an_empty_run_has_no_numbers():
    empty = {"format": 1, "fake": False, "machine": {"device": "X"}, "stages": []}
    assert "###" not in tables.markdown(empty)


def test_the_page_has_markers():
    text = (ROOT / "docs" / "gpu.md").read_text()
    assert text.count(gpu_report.BEGIN) == text.count(gpu_report.END) == 1
    assert text.index(gpu_report.BEGIN) < text.index(gpu_report.END)


# ---- the whole, on the fake device -----------------------------------------------------------------------------------


def dry_run(folder: Path, stages: str, *arguments: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_acceptance.py"), "--fake", "--out", str(folder / "out")]
    paths = [entry for entry in sys.path if entry]
    inherited = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--stages", stages, *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        cwd=folder,
    )
    return done.returncode, read(folder), done.stdout + done.stderr


def test_dry_run(tmp_path):
    """The stages that take seconds, and the fake tools that know the real ones' command lines."""
    status, found, said = dry_run(tmp_path, "smoke,linear,profile")
    assert status == 0, said + (tmp_path / "out" / "log.txt").read_text()[-3000:]
    assert [entry["status"] for entry in found.values()] == ["ok"] * 3
    smoke = found["smoke"]["data"]
    assert len(smoke) > 20 and smoke["clusters"]["slices"] and all(value["ok"] for value in smoke.values())
    assert {"cuda: js bfloat16, V = 5003", "cuda: linear", "capture, in a process of its own"} <= smoke.keys()
    (linear,) = found["linear"]["data"].values()
    assert {"fastloss", "fastloss, 56 MiB", "fastloss, 6 GiB", "torch", "floor"} <= linear["alternatives"].keys()
    assert {"liger", "cut-cross-entropy", "quack", "torch.compile"} <= {*linear["skipped"], *linear["alternatives"]}
    by_ncu = found["profile"]["data"]["cuda: V = 504"]
    assert by_ncu["by"] == "ncu" and {"copy, bfloat16", "plain, bfloat16", "JS, bfloat16"} <= by_ncu["families"].keys()


def test_dry_run_with_a_finding_and_without_counters(tmp_path):
    """An error that the sanitizer reports is a failure of the run; kernel times do without Nsight Compute."""
    (tmp_path / "found.txt").write_text(MEMCHECK)
    tools = {"FASTLOSS_FAKE_SANITIZER": str(tmp_path / "found.txt"), "FASTLOSS_FAKE_NCU": "denied"}
    status, found, said = dry_run(tmp_path, "sanitizer,profile", **tools)
    assert status == 1 and found["sanitizer"]["status"] == "failed" and found["profile"]["status"] == "ok", said
    first = found["sanitizer"]["data"]["cuda: memcheck"]
    assert first["errors"] == 2 and first["ok"] is False and first["status"] == 0
    for value in found["profile"]["data"].values():
        assert value["by"] == "torch.profiler" and "ERR_NVGPUCTRPERM" in value["without_ncu"]
        assert "JS, bfloat16" in value["families"]


@pytest.mark.slow
def test_profile_keeps_times_where_ncu_fails(tmp_path):
    """A failure of Nsight Compute that is no lack of permission is a failure; the times are kept nevertheless."""
    status, found, said = dry_run(tmp_path, "profile", FASTLOSS_FAKE_NCU="broken")
    (value,) = found["profile"]["data"].values()
    assert status == 1 and value["ok"] is False and "exit status 9" in value["without_ncu"], said
    assert value["by"] == "torch.profiler" and "JS, bfloat16" in value["families"]


@pytest.mark.slow
def test_dry_run_of_everything(tmp_path):
    status, found, said = dry_run(tmp_path, ",".join(stage.name for stage in stages.STAGES))
    assert status == 0, said + (tmp_path / "out" / "log.txt").read_text()[-3000:]
    assert [*found] == [stage.name for stage in stages.STAGES] and {e["status"] for e in found.values()} == {"ok"}
