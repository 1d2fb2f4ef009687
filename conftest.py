"""`pytest --benchmark` measures: it runs benchmarks/, not the tests. So does `--benchmark-only` without a path."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastloss")
    group.addoption("--benchmark", action="store_true", help="run the benchmarks, and not the tests")
    group.addoption("--quick", action="store_true", help="small shapes, few rounds: a smoke test, no measurement")
    group.addoption("--no-compile", action="store_true", help="leave out torch.compile")
    group.addoption("--device", default="cpu", help="cpu, cuda, cuda:1, xpu: where to measure (default: cpu)")
    group.addoption("--report-dir", default="out/bench", help="for report.json and report.png (default: out/bench)")


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its option when it is configured
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark"):
        config.option.benchmark_only = True
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    if config.getoption("benchmark_only", False) and not named:
        config.args[:] = [str(config.rootpath / "benchmarks")]
