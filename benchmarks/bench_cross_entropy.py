"""fastloss.cross_entropy beside torch's, torch.compile's and the memory floor.

pytest-benchmark times fastloss; before each of its rounds the alternatives run once, so that all of them meet the same
moments of the machine. Their medians and the ratios are in `extra_info`, which --benchmark-json keeps.
"""

from __future__ import annotations

from typing import Any

import pytest

from fastloss.bench import measure, records
from fastloss.bench.cases import FASTLOSS, Case, cases
from fastloss.bench.report import Report

# A compiler's warnings are no failure of a benchmark.
pytestmark = pytest.mark.filterwarnings("default")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        accelerator = not metafunc.config.getoption("device").startswith("cpu")
        table = cases(metafunc.config.getoption("quick"), accelerator)
        metafunc.parametrize("case", table, ids=[case.name for case in table])


def test_case(case: Case, benchmark: Any, report: Report) -> None:
    if why := measure.not_enough_memory(case, report.device):
        report.skipped[str(case)] = why
        pytest.skip(why)
    benchmark.group = case.work
    settings = report.settings
    if case.environment:  # torch reads it when it starts: timed over there
        result = benchmark.pedantic(records.in_child, (case, settings))
    elif not report.device.wall_clock:  # timed by the device's own events: pytest's time is that of measuring
        result = benchmark.pedantic(measure.run, (case, settings, report.device))
        report.device.release()
    else:
        race = measure.Race(case, settings, report.device)
        fastloss = race.entries[FASTLOSS]

        def others() -> None:
            race.round(skip=[FASTLOSS])
            fastloss.prepare()

        benchmark.pedantic(fastloss.call, setup=others, rounds=settings.rounds_of(case))
        if benchmark.stats is None:
            pytest.skip("nothing is timed under --benchmark-disable")
        race.seconds[FASTLOSS] = list(benchmark.stats.stats.data)
        result = race.result()
    benchmark.extra_info.update(result.summary())
    report.add(result)


@pytest.mark.parametrize("name", records.RECORDS)
def test_record(name: str, benchmark: Any, report: Report) -> None:
    """Not timings of one call: what was measured is in `extra_info`, the time is that of measuring it."""
    benchmark.group = "records"
    rows = benchmark.pedantic(records.RECORDS[name], (report.settings, report.device))
    benchmark.extra_info["rows"] = rows
    report.records[name] = rows
