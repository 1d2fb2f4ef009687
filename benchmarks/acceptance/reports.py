"""A plugin of pytest: hands each failure over when it happens, and the counts so far, in case that time runs out."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

from .results import emit


class Reporter:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.said = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            message = getattr(getattr(report.longrepr, "reprcrash", None), "message", None) or str(report.longrepr)
            emit(f"failure: {report.nodeid}", {"ok": False, "when": report.when, "message": message[:600]})
        if time.monotonic() - self.said > 2:
            self._say()

    def pytest_sessionfinish(self, session: Any) -> None:
        self._say()

    def _say(self) -> None:
        self.said = time.monotonic()
        emit("so far", dict(self.counts))


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # with xdist's workers: in the process that hears of all
        config.pluginmanager.register(Reporter(), "acceptance-reporter")
