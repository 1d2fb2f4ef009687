"""pytest --benchmark: fastloss.bench's table under pytest-benchmark, and its report at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastloss.bench import missing

if absent := missing():
    raise pytest.UsageError(absent)

from fastloss.bench.cases import Settings
from fastloss.bench.devices import Unavailable, open_device
from fastloss.bench.report import Report

_REPORT = pytest.StashKey[Report]()


def pytest_configure(config: pytest.Config) -> None:
    compiled = not config.getoption("no_compile")
    settings = Settings.of(config.getoption("quick"), compiled, config.getoption("device"))
    try:
        config.stash[_REPORT] = Report(settings, open_device(settings.device))
    except Unavailable as why:
        raise pytest.UsageError(f"--device {settings.device}: {why}") from None


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    return request.config.stash[_REPORT]


def pytest_terminal_summary(config: pytest.Config) -> None:
    report = config.stash[_REPORT]
    if not (report.results or report.records or report.skipped):
        return
    report.show()
    for path in report.write(Path(config.getoption("report_dir"))):
        print(path)
