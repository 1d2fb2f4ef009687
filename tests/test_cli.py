"""python -m fastloss in processes of its own, as users run it: what it says must be so."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastloss import doctor
from fastloss.backends import native

_VARIABLES = ("FASTLOSS_BACKEND", "FASTLOSS_ISA")


def run(
    *arguments: str, cwd: Path, interpreter: tuple[str, ...] = ("-m", "fastloss"), **environment: str
) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    command = [sys.executable, *interpreter, *arguments]
    return subprocess.run(command, env=inherited | environment, cwd=cwd, capture_output=True, text=True, timeout=300)


def examined(cwd: Path, **environment: str) -> dict:
    done = run("doctor", "--json", cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def without(*modules: str) -> tuple[str, ...]:
    """An interpreter where these cannot be imported."""
    hide = "; ".join(f"sys.modules[{name!r}] = None" for name in modules)
    return ("-c", f"import runpy, sys; {hide}; runpy.run_module('fastloss', run_name='__main__')")


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
    assert set(report["records"]) == {"small calls", "peak memory", "import time", "error"}
    names = [case["name"] for case in report["cases"]]
    assert len(set(names)) == len(names) > 5
    for case in report["cases"]:
        check_case(case)
    check_records(report["records"])

    picture = (tmp_path / "report" / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 10_000


def check_case(case: dict) -> None:
    backward = case["name"].startswith("forward+backward")
    expected = {"fastloss", "torch", "floor"}
    if backward:
        expected |= {"fastloss, first touch", "copy into a fresh buffer"}
    assert expected <= set(case["seconds"])
    assert "torch.compile" in case["skipped"]
    for name, seconds in case["seconds"].items():
        assert len(seconds) == 3 and min(seconds) > 0, name
        assert case["median_ms"][name] == pytest.approx(sorted(seconds)[1] * 1e3)
    ratios, median = case["ratios"]["fastloss"], case["median_ms"]
    assert ratios["over_torch"] == pytest.approx(median["torch"] / median["fastloss"])
    assert ratios["share_of_floor"] == pytest.approx(median["floor"] / median["fastloss"])
    assert ratios["over_compile"] is None
    dtype = 4 if "float32" in case["name"] else 2
    passes = (2 if backward else 1) + ("probabilities" in case["name"])
    assert case["bytes"] == 512 * 8000 * dtype * passes


def check_records(records: dict) -> None:
    for row in records["peak memory"]:
        # torch keeps the log-probabilities and makes a gradient of them; fastloss holds rows.
        assert row["torch_mib"] > 0.9 * row["gradient_mib"]
        assert row["fastloss_mib"] < 0.5 * row["gradient_mib"]
    for row in records["error"]:
        for part in ("loss", "grad"):
            assert row[f"fastloss_{part}"] <= 2 * row[f"torch_{part}"], row
    for row in records["small calls"]:
        assert row["fastloss_us"] > 0 and row["torch_us"] > 0
    assert records["import time"][0]["import_ms"] > 0
