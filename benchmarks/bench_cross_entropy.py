"""fastloss.cross_entropy beside torch's, torch.compile's and the memory floor.

pytest-benchmark times fastloss; before each of its rounds the alternatives run once, so that all of them meet the same
moments of the machine. Their medians and the ratios are in `extra_info`, which --benchmark-json keeps.
"""

from __future__ import annotations

from typing import Any

import pytest

from fastloss.bench import measure, records
from fastloss.bench.cases import Case, cases
from fastloss.bench.measure import FASTLOSS
from fastloss.bench.report import Report

# A compiler's warnings are no failure of a benchmark.
pytestmark = pytest.mark.filterwarnings("default")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        table = cases(metafunc.config.getoption("quick"))
        metafunc.parametrize("case", table, ids=[case.name for case in table])


def test_case(case: Case, benchmark: Any, report: Report) -> None:
    if why := measure.not_enough_memory(case):
        report.skipped[str(case)] = why
        pytest.skip(why)
    benchmark.group = case.work
    settings = report.settings
    if case.environment:  # torch reads it when it starts: timed over there
        result = benchmark.pedantic(records.in_child, (case, settings))
    else:
        race = measure.Race(case, settings)
        fastloss = race.entries[FASTLOSS]

        def others() -> None:
            race.round(skip=[FASTLOSS])
            fastloss.prepare()

        benchmark.pedantic(fastloss.call, setup=others, rounds=settings.rounds)
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
    rows = benchmark.pedantic(records.RECORDS[name], (report.settings,))
    benchmark.extra_info["rows"] = rows
    report.records[name] = rows
