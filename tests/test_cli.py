"""python -m fastloss in processes of its own, as users run it: what it says must be so."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastloss import bench, doctor
from fastloss.backends import native

PATIENCE = 3600  # seconds: against what hangs, more than the slowest machine needs
_VARIABLES = ("FASTLOSS_BACKEND", "FASTLOSS_ISA")


def run(
    *arguments: str, cwd: Path, interpreter: tuple[str, ...] = ("-m", "fastloss"), **environment: str
) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    command = [sys.executable, *interpreter, *arguments]
    return subprocess.run(
        command, env=inherited | environment, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE
    )


def examined(cwd: Path, **environment: str) -> dict:
    done = run("doctor", "--json", cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def without(*modules: str) -> tuple[str, ...]:
    """An interpreter where these cannot be imported."""
    hide = "; ".join(f"sys.modules[{name!r}] = None" for name in modules)
    return ("-c", f"import runpy, sys; {hide}; runpy.run_module('fastloss', run_name='__main__')")


def test_doctor_where_torch_has_cuda_and_there_is_no_driver(monkeypatch):
    def built_for(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for)
    report = doctor.examine()
    assert report["healthy"] and {choice["device"] for choice in report["backends"]} == {"cpu"}
    assert "built for cuda, but finds no device" in report["machine"]["accelerator"]


def test_no_command_prints_help(tmp_path):
    done = run(cwd=tmp_path)
    assert done.returncode == 0
    assert "doctor" in done.stdout and "bench" in done.stdout


def test_unknown_command_is_refused(tmp_path):
    done = run("docter", cwd=tmp_path)
    assert done.returncode == 2
    assert "docter" in done.stderr


@pytest.mark.skipif(native._native is None, reason="the kernels are not built")
def test_doctor_says_what_runs(tmp_path):
    report = examined(tmp_path)
    assert report["healthy"] is True
    assert report["environment"].keys().isdisjoint(_VARIABLES)
    assert report["build"]["torch"] == torch.__version__
    assert report["build"]["isas_available"] == native._native.available_isas()
    assert report["build"]["isa"] == native._native.available_isas()[0]  # the best one, unless forced
    assert report["build"]["team"] in ("openmp", "threads")
    choices = {(c["device"], c["dtype"]): c for c in report["backends"]}
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        assert choices["cpu", dtype]["chosen"] == "cpu"
        assert "comes first" in choices["cpu", dtype]["others"]["reference"]
    tested = [test["isa"] for test in report["self_test"] if test["backend"] == "cpu"]
    assert tested == native._native.available_isas()


def test_doctor_shows_a_forced_backend(tmp_path):
    report = examined(tmp_path, FASTLOSS_BACKEND="reference")
    assert report["environment"]["FASTLOSS_BACKEND"] == "reference"
    for choice in report["backends"]:
        assert choice["chosen"] == "reference"
        assert "forced" in choice["others"]["cpu"]


@pytest.mark.skipif(native._native is None, reason="the kernels are not built")
def test_doctor_shows_a_forced_instruction_set(tmp_path):
    for isa in native._native.available_isas()[-2:]:  # the two least likely to be the default
        report = examined(tmp_path, FASTLOSS_ISA=isa)
        assert report["build"]["isa"] == isa
        assert report["environment"]["FASTLOSS_ISA"] == isa


@pytest.mark.parametrize("interpreter", [("-m", "fastloss"), without("rich", "rich.console")], ids=["rich", "plain"])
def test_doctor_text(tmp_path, interpreter):
    done = run("doctor", cwd=tmp_path, interpreter=interpreter, FASTLOSS_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    assert "'reference' is forced" in done.stdout
    assert done.stdout.rstrip().endswith("healthy")
    assert ("┃" in done.stdout) == (interpreter[0] == "-m")


def test_doctor_finds_a_wrong_kernel(monkeypatch, capsys):
    right = doctor.fastloss.cross_entropy
    monkeypatch.setattr(doctor.fastloss, "cross_entropy", lambda x, y: right(x, y) * 1.05)
    assert doctor.main(as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["healthy"] is False


def test_doctor_takes_nan_for_wrong(monkeypatch):
    right = doctor.fastloss.cross_entropy
    monkeypatch.setattr(doctor.fastloss, "cross_entropy", lambda x, y: right(x, y) * math.nan)
    assert not any(test["passed"] for test in doctor.self_test())


def test_doctor_leaves_the_choice_as_it_was():
    before = doctor.build_facts(), doctor.refusals(torch.device("cpu"), torch.float32, torch.int64)
    doctor.self_test()
    assert (doctor.build_facts(), doctor.refusals(torch.device("cpu"), torch.float32, torch.int64)) == before


def test_bench_names_the_extra_when_it_is_missing(tmp_path):
    done = run("bench", "--quick", cwd=tmp_path, interpreter=("-c", _HIDE_MATPLOTLIB))
    assert done.returncode == 1
    assert "matplotlib" in done.stderr and "fastloss[bench]" in done.stderr
    assert "Traceback" not in done.stderr


_HIDE_MATPLOTLIB = """
import importlib.util, runpy
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
runpy.run_module("fastloss", run_name="__main__")
"""


def test_bench_refuses_no_threads(tmp_path):
    done = run("bench", "--threads", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert "--threads" in done.stderr


def test_bench_quick(tmp_path):
    for name in ("matplotlib", "psutil", "rich"):
        pytest.importorskip(name)
    done = run("bench", "--quick", "--no-compile", "--threads", "1", "--out", "report", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "forward+backward" in done.stdout and "peak memory" in done.stdout

    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["settings"]["rounds"] == 3
    assert report["skipped"] == {}
    records = {"small calls", "peak memory", "linear memory", "shared vocabulary", "import time", "error"}
    assert set(report["records"]) == records
    names = [case["name"] for case in report["cases"]]
    assert len(set(names)) == len(names) > 5
    for case in report["cases"]:
        check_case(case)
    check_records(report["records"])

    picture = (tmp_path / "report" / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 10_000


def over(name: str, median: dict) -> Any:
    """A baseline's ratio; None of one that was left out."""
    return pytest.approx(median[name] / median["fastloss"]) if name in median else None


def check_case(case: dict) -> None:
    backward, linear = case["name"].startswith("forward+backward"), "flop" in case
    expected = {"fastloss", "floor"} | ({"torch", "torch, chunked"} if linear else {"torch"})
    if linear:  # where a machine is slow, what would take too long is left out, and said
        missing = expected - set(case["seconds"]) - {"fastloss", "floor"}
        assert all(case["skipped"][name].startswith("TimeoutError: would take ") for name in missing), case["skipped"]
        expected -= missing
    if backward and not linear:
        expected |= {"fastloss, first touch", "copy into a fresh buffer"}
    assert expected <= set(case["seconds"])
    assert "torch.compile" in case["skipped"]
    for name, seconds in case["seconds"].items():
        assert len(seconds) == 3 and min(seconds) > 0, name
        assert case["median_ms"][name] == pytest.approx(sorted(seconds)[1] * 1e3)
    ratios, median = case["ratios"]["fastloss"], case["median_ms"]
    assert ratios["over_torch"] == over("torch", median)
    assert ratios["share_of_floor"] == pytest.approx(median["floor"] / median["fastloss"])
    assert ratios["over_compile"] is None
    if linear:
        assert ratios["over_chunked"] == over("torch, chunked", median)
        assert case["flop"] == 2 * 256 * 64 * 8000 * (3 if backward else 1)
        return
    dtype = 4 if "float32" in case["name"] else 2
    reads = 1 + case["floor"].startswith("torch.add")  # a target of the logits' size
    assert reads == 1 + any(loss in case["name"] for loss in ("probabilities", "forward-KL", "reverse-KL", "JS"))
    passes = reads + 1 if backward else reads
    assert case["bytes"] == 512 * 8000 * dtype * passes


@pytest.mark.parametrize(("rows_per_second", "left_out"), [(1.0, True), (1e9, False)])
@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="torch has no chunked loss")
def test_bench_leaves_out_what_would_take_too_long(monkeypatch, tmp_path, capsys, rows_per_second, left_out):
    """By the estimate, from a clock that goes as the test says: the report has the others, and the reason."""
    for name in ("matplotlib", "psutil", "rich"):
        pytest.importorskip(name)
    from fastloss.bench import cases, measure, records

    case = cases.Case("linear", "float32", 256, 8000, True, compiled=False, H=64)
    monkeypatch.setattr(cases, "cases", lambda quick, accelerator: [case])
    monkeypatch.setattr(records, "RECORDS", {})
    patient, clock = measure.Race._patient, measure.time.perf_counter

    def by_the_clock(race, loss):
        moments = iter([0.0, 16 / rows_per_second])  # a sixteenth of 256 rows
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(moments)))
        try:
            return patient(race, loss)
        finally:
            monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=clock))

    monkeypatch.setattr(measure.Race, "_patient", by_the_clock)
    assert bench.main(quick=True, out=str(tmp_path), compiled=False) == 0
    (found,) = json.loads((tmp_path / "report.json").read_text())["cases"]
    check_case(found)
    assert {"fastloss", "floor"} <= set(found["seconds"])
    for name in ("torch", "torch, chunked"):
        assert (name in found["skipped"]) is left_out is not (name in found["seconds"])
        if left_out:
            assert found["skipped"][name] == "TimeoutError: would take 256 s, from 16 of its 256 rows"
    assert ("would take 256 s" in capsys.readouterr().out.replace("\n", " ")) is left_out


def check_records(records: dict) -> None:
    for row in records["peak memory"]:
        # torch keeps the log-probabilities and makes a gradient of them; fastloss holds rows.
        assert row["torch_mib"] > 0.9 * row["gradient_mib"]
        assert row["fastloss_mib"] < 0.5 * row["gradient_mib"]
    for row in records["linear memory"]:
        assert row["fastloss_mib"] < row["torch_mib"]
    for row in records["shared vocabulary"]:
        assert all(value > 0 for name, value in row.items() if name != "case")
    for row in records["error"]:
        for part in ("loss", "grad"):
            assert row[f"fastloss_{part}"] <= 2 * row[f"torch_{part}"], row
    for row in records["small calls"]:
        assert row["fastloss_us"] > 0 and row["torch_us"] > 0
    assert records["import time"][0]["import_ms"] > 0


# ---- bench on a device that works while the host goes on: faked, its tensors lie on the CPU --------------------------


class FakeModule:
    """What the benchmark takes from torch.cuda. Time passes by one millisecond for each event, and can only be read
    once the device was waited for."""

    def __init__(self) -> None:
        self.moments = self.seen = self.waits = self.spins = 0
        self.peak = 0
        module = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                module.moments += 1
                self.moment = module.moments

            def elapsed_time(self, end: Event) -> float:
                assert self.moment < end.moment <= module.seen, "not waited for"
                return end.moment - self.moment

        self.Event = Event

    def synchronize(self) -> None:
        self.seen = self.moments
        self.waits += 1

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(name="Fake 100", total_memory=80 << 30, L2_cache_size=1 << 20)

    def _sleep(self, cycles: int) -> None:
        self.spins += 1

    def mem_get_info(self) -> tuple[int, int]:
        return 4 << 30, 80 << 30

    def memory_reserved(self) -> int:
        return 3 << 20

    def memory_allocated(self) -> int:
        return 2 << 20

    def reset_peak_memory_stats(self) -> None:
        self.peak = 10 << 20

    def max_memory_allocated(self) -> int:
        return self.peak

    def empty_cache(self) -> None:
        pass


@pytest.fixture
def fake(monkeypatch):
    for name in ("matplotlib", "psutil", "rich"):
        pytest.importorskip(name)
    from fastloss.bench import devices

    used = []

    @contextmanager
    def use_backend(name):
        used.append(name)
        yield

    module = FakeModule()
    device = devices.Accelerator(torch.device("cpu"), module)
    monkeypatch.setattr(devices, "open_device", lambda text: device)
    monkeypatch.setattr(
        devices, "refusals", lambda *call: {"cpu": "no", "cuda": None, "triton": None, "reference": None}
    )
    monkeypatch.setattr(devices, "use_backend", use_backend)
    return SimpleNamespace(module=module, device=device, used=used)


def test_bench_on_a_device(fake, monkeypatch, tmp_path, capsys):
    """Both backends beside torch, by the device's own clock, in a report that says where."""
    from fastloss.bench import cases, records

    table = [cases.Case("plain", "float32", 16, 1000, backward) for backward in (True, False)]
    monkeypatch.setattr(cases, "cases", lambda quick, accelerator: table if accelerator else [])
    monkeypatch.setattr(records, "RECORDS", {name: records.RECORDS[name] for name in ("peak memory", "error")})
    assert bench.main(quick=True, out=str(tmp_path), compiled=False, device="cuda") == 0
    printed = capsys.readouterr().out
    assert "Fake 100" in printed and "triton" in printed and "backend" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["machine"]["device"] == "cpu: Fake 100" and report["settings"]["device"] == "cuda"
    for case in report["cases"]:
        assert case["fastloss"] == {"fastloss": "cuda", "fastloss, triton": "triton"}
        assert {"fastloss", "fastloss, triton", "torch", "floor"} <= set(case["seconds"])
        for seconds in case["seconds"].values():
            assert seconds == [1e-3] * 3  # from one event to the next, in seconds
        assert case["ratios"]["fastloss, triton"]["share_of_floor"] == 1
        assert case["ratios"]["fastloss"]["gb_per_s"] == pytest.approx(case["bytes"] / 1e6)
    assert fake.used == (["cuda", "triton"] * (3 + 3)) * 2  # warm-ups and rounds, of two cases
    for row in report["records"]["peak memory"]:
        size = 4 if "float32" in row["case"] else 2
        gradient = report["settings"]["record_shape"][0] * report["settings"]["record_shape"][1] * size
        assert row["fastloss_mib"] * 2**20 == (8 << 20) - gradient


def test_bench_waits_once_a_round(fake):
    from fastloss.bench import cases, measure

    race = measure.Race(cases.Case("plain", "float32", 16, 1000, True), cases.Settings(compiled=False), fake.device)
    before = fake.module.waits, fake.module.spins
    race.round()
    assert fake.module.waits == before[0] + 1
    assert fake.module.spins == before[1] + len(race.entries)


def test_bench_rotates_inputs_on_a_device(fake):
    """Together they are twice as large as the cache, each call has another than the last, and no gradient is kept."""
    from fastloss.bench import cases, measure

    case = cases.Case("plain", "float32", 16, 1000, True)
    race = measure.Race(case, cases.Settings(compiled=False), fake.device)
    sets = race.data.sets
    assert sum(data.x.nbytes for data in sets) >= 2 << 20 > sum(data.x.nbytes for data in sets[1:])
    assert not torch.equal(sets[0].x, sets[1].x)
    read = []
    race.entries = {str(i): measure.Alternative(lambda: read.append(race.data.turn)) for i in range(len(sets))}
    race.seconds = {name: [] for name in race.entries}
    race.round()
    assert sorted(read) == list(range(len(sets)))
    large = cases.Case("plain", "bfloat16", 16384, 32000, True)
    assert fake.device.copies(large.N * large.V * 2) == 1  # no cache holds one of these
    assert "GiB of memory, 4.0 GiB are available" in measure.not_enough_memory(large, fake.device)


@pytest.mark.parametrize("where", ["case", "release"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyError, ValueError], ids=lambda e: e.__name__)
def test_bench_goes_on_after_a_failure(fake, monkeypatch, tmp_path, capsys, error, where):
    """Out of memory in one case, or whatever: the others are measured, the report is written, the status says so."""
    from fastloss.bench import cases, measure, records

    table = [cases.Case("plain", "float32", N, 1000, True) for N in (8, 16)]
    monkeypatch.setattr(cases, "cases", lambda quick, accelerator: table)
    monkeypatch.setattr(records, "RECORDS", {})
    run_case = measure.run

    def run(case, *rest):
        if case.N == 8 and where == "case":
            raise error("tried to allocate too much")
        return run_case(case, *rest)

    releases = iter([where == "release", False])

    def release():
        if next(releases):
            raise error("tried to allocate too much")

    monkeypatch.setattr(measure, "run", run)
    monkeypatch.setattr(type(fake.device), "release", lambda self: release())
    assert bench.main(quick=True, out=str(tmp_path), compiled=False, device="cuda") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [case["name"] for case in report["cases"]][-1] == table[1].name
    assert "tried to allocate too much" in report["skipped"][str(table[0])]
    assert "tried to allocate too much" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize(
    ("name", "says"), [("cuda", "sees no cuda device"), ("gpu", "no device"), ("mps", "not on mps")]
)
def test_bench_says_that_there_is_no_device(tmp_path, capsys, name, says):
    for extra in ("matplotlib", "psutil", "rich"):
        pytest.importorskip(extra)
    assert bench.main(quick=True, out=str(tmp_path), device=name) == 1
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_table_for_accelerators():
    from fastloss.bench.cases import cases

    table = cases(accelerator=True)
    assert len({case.name for case in table}) == len(table)
    assert not any(case.environment for case in [*table, *cases(quick=True, accelerator=True)])
    for dtype in ("bfloat16", "float32"):
        for N, V in (16384, 32000), (8192, 128256), (4096, 262144):
            assert {c.backward for c in table if (c.dtype, c.N, c.V, c.loss) == (dtype, N, V, "plain")} == {True, False}


def test_inputs_of_the_benchmark_lie_on_its_device():
    """All of them: they were on the CPU whatever the device, and no case could run on a GPU."""
    pytest.importorskip("psutil")
    from fastloss.bench.cases import Case, inputs
    from fastloss.bench.losses import LOSSES

    for loss in LOSSES:
        case = Case(loss, "bfloat16", 16, 1000, True, H=32 if loss == "linear" else 0)
        x, target, arguments = inputs(case, device=torch.device("meta"))
        tensors = [x, target, *(value for value in arguments.values() if isinstance(value, torch.Tensor))]
        assert {tensor.device.type for tensor in tensors} == {"meta"}, loss


def test_linear_losses_in_the_table_for_accelerators(fake):
    """In two shapes of today's models; their memory counts logits and all that lies beside the weight."""
    from fastloss.bench import cases, measure

    linear = [case for case in cases.cases(accelerator=True) if case.H]
    shapes = {(8192, 4096, 128256), (4096, 2048, 151936)}
    assert (
        {(c.N, c.H, c.V) for c in linear if c.backward} == {(c.N, c.H, c.V) for c in linear if not c.backward} == shapes
    )
    assert {case.dtype for case in linear} == {"bfloat16"} and {case.loss for case in linear} == {"linear"}
    large = next(case for case in linear if case.backward and case.H == 4096)
    said = measure.not_enough_memory(large, fake.device)
    assert float(said.split()[1]) >= (9 * 8192 * 128256 * 2 + 128256 * 4096 * (2 + 2 + 4)) / 2**30 - 0.1
    forward = next(case for case in linear if not case.backward and case.H == 4096)
    assert float(measure.not_enough_memory(forward, fake.device).split()[1]) < float(said.split()[1])


@pytest.mark.parametrize("backward", [True, False])
def test_bench_of_a_linear_loss_on_a_device(fake, monkeypatch, tmp_path, capsys, backward):
    """A row for each backend; the floor is the matmuls of all rows in the case's dtype."""
    from fastloss.bench import cases, measure, records

    case = cases.Case("linear", "bfloat16", 16, 500, backward, H=8, compiled=False)
    monkeypatch.setattr(cases, "cases", lambda quick, accelerator: [case])
    monkeypatch.setattr(records, "RECORDS", {})
    floors, fastest = [], measure.fastest_product
    monkeypatch.setattr(measure, "fastest_product", lambda x, w, on: floors.append((x, w)) or fastest(x, w, on))
    assert bench.main(quick=True, out=str(tmp_path), compiled=False, device="cuda") == 0
    ((x, weight),) = floors
    assert x.shape == (16, 8) and weight.shape == (500, 8) and x.dtype == weight.dtype == torch.bfloat16
    (found,) = json.loads((tmp_path / "report.json").read_text())["cases"]
    assert found["fastloss"] == {"fastloss": "cuda", "fastloss, triton": "triton"}
    assert found["flop"] == 2 * 16 * 8 * 500 * (3 if backward else 1)
    assert {"fastloss", "fastloss, triton", "torch", "floor"} <= set(found["seconds"])
    printed = capsys.readouterr().out
    assert "triton" in printed and "backend" in printed and "16x8x500" in printed


# ---- bench --only and --resume ---------------------------------------------------------------------------------------


@pytest.fixture
def small_table(fake, monkeypatch):
    """Three cases and two records; the list of those that were measured."""
    from fastloss.bench import cases, measure, records

    table = [
        cases.Case("plain", "float32", 8, 1000, True),
        cases.Case("plain", "bfloat16", 8, 1000, True),
        cases.Case("linear", "float32", 8, 1000, True, H=8),
    ]
    monkeypatch.setattr(cases, "cases", lambda quick, accelerator: table)
    measured, run_case = [], measure.run
    monkeypatch.setattr(measure, "run", lambda case, *rest: measured.append(case.name) or run_case(case, *rest))
    made = {
        name: (lambda settings, device, name=name: measured.append(name) or [{"case": 1}])
        for name in ("error", "import time")
    }
    monkeypatch.setattr(records, "RECORDS", made)
    monkeypatch.setattr("fastloss.bench.report._record_met", lambda name, row: None)
    return measured


def bench_there(folder: Path, **options: Any) -> int:
    return bench.main(quick=True, out=str(folder), compiled=False, device="cuda", **options)


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("plain", ["forward+backward-plain-float32-8x1000", "forward+backward-plain-bfloat16-8x1000"]),
        ("^linear, float32 8x8x", ["forward+backward-linear-float32-8x8x1000"]),  # as it is printed
        ("bfloat16|error", ["forward+backward-plain-bfloat16-8x1000", "error"]),
        ("import", ["import time"]),
    ],
)
def test_bench_only(small_table, tmp_path, only, expected):
    assert bench_there(tmp_path, only=only) == 0
    assert small_table == expected
    report = json.loads((tmp_path / "report.json").read_text())
    assert [*(case["name"] for case in report["cases"]), *report["records"]] == expected


@pytest.mark.parametrize(
    ("only", "says"),
    [
        ("nothing like it", "matches no case and no record; there are, among others: forward+"),
        ("(", "is no regular expression"),
    ],
)
def test_bench_only_refuses(small_table, tmp_path, capsys, only, says):
    assert bench_there(tmp_path, only=only) == 1
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1 and not small_table
    assert not list(tmp_path.iterdir())


def test_bench_resumes(small_table, tmp_path):
    """What was measured stays with its numbers, what failed or was not reached is measured, in the table's order."""
    assert bench_there(tmp_path, only="bfloat16|error") == 0
    before = json.loads((tmp_path / "report.json").read_text())
    small_table.clear()
    assert bench_there(tmp_path, resume=True) == 0
    assert small_table == [
        "forward+backward-plain-float32-8x1000",
        "forward+backward-linear-float32-8x8x1000",
        "import time",
    ]
    after = json.loads((tmp_path / "report.json").read_text())
    assert [case["name"].split("-")[1:3] for case in after["cases"]] == [
        ["plain", "float32"], ["plain", "bfloat16"], ["linear", "float32"]
    ]  # fmt: skip
    assert after["cases"][1] == before["cases"][0] and set(after["records"]) == {"error", "import time"}
    small_table.clear()
    assert bench_there(tmp_path, resume=True) == 0 and not small_table
    assert json.loads((tmp_path / "report.json").read_text())["cases"] == after["cases"]


def test_bench_resumes_nothing_at_first(small_table, tmp_path):
    assert bench_there(tmp_path / "new", resume=True, only="error") == 0
    assert small_table == ["error"]


def test_bench_resumes_what_failed(small_table, tmp_path, monkeypatch):
    from fastloss.bench import measure

    run_case = measure.run

    def run(case, *rest):
        if case.dtype == "bfloat16":
            raise torch.OutOfMemoryError("tried to allocate too much")
        return run_case(case, *rest)

    monkeypatch.setattr(measure, "run", run)
    assert bench_there(tmp_path) == 1
    monkeypatch.setattr(measure, "run", run_case)
    small_table.clear()
    assert bench_there(tmp_path, resume=True) == 0
    assert small_table == ["forward+backward-plain-bfloat16-8x1000"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["skipped"] == {} and len(report["cases"]) == 3


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("settings", "rounds", 51),
        ("build", "torch", "1.0"),
        ("machine", "device", "cuda: another"),
        ("settings", "device", "cpu"),
    ],
)
def test_bench_does_not_resume_another_measurement(small_table, tmp_path, capsys, where, name, value):
    assert bench_there(tmp_path, only="error") == 0
    path = tmp_path / "report.json"
    report = json.loads(path.read_text())
    report[where][name] = value
    path.write_text(json.dumps(report))
    small_table.clear()
    capsys.readouterr()
    assert bench_there(tmp_path, resume=True) == 1
    said = capsys.readouterr().err
    assert f"{name} was {value}, and is " in said and "--out" in said and not small_table
    assert json.loads(path.read_text()) == report


def test_bench_does_not_resume_what_is_no_report(small_table, tmp_path, capsys):
    (tmp_path / "report.json").write_text('{"cases": [')
    assert bench_there(tmp_path, resume=True) == 1
    assert "is no report of a benchmark" in capsys.readouterr().err


def test_bench_takes_only_and_resume(monkeypatch):
    from fastloss.__main__ import main

    given = []
    monkeypatch.setattr(bench, "main", lambda *arguments: given.append(arguments) or 0)
    assert main(["bench", "--only", "plain", "--resume", "--device", "cuda:1", "--no-compile"]) == 0
    assert main(["bench"]) == 0
    assert given == [
        (False, "out/bench", None, False, "cuda:1", "plain", True),
        (False, "out/bench", None, True, "cpu", None, False),
    ]
