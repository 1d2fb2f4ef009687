"""What compute-sanitizer prints."""

from __future__ import annotations

import re
from typing import Any

_SUMMARY = re.compile(
    r"^=+ (ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards? displayed \((\d+) errors?, (\d+) warnings?\))"
)


def parse(text: str) -> dict[str, Any]:
    """What the summary counts, hazards of racecheck too, and the first reports. No summary: None, which is no zero."""
    errors, warnings, reports, report = None, 0, [], []
    for line in text.splitlines():
        if not line.startswith("========="):
            continue
        if match := _SUMMARY.match(line):
            _, number, _, of_these = match.groups()
            errors, warnings = int(number), int(of_these or 0)
        elif line.strip("= ") in ("", "COMPUTE-SANITIZER"):  # between two reports
            reports.append(report)
            report = []
        else:
            report.append(line.removeprefix("=========").strip())
    found = ["\n".join(lines[:6])[:600] for lines in [*reports, report] if _is_report(lines)]
    return {"errors": errors, "warnings": warnings, "reports": found[:10]}


def _is_report(lines: list[str]) -> bool:
    return any(re.search(r"Invalid|Uninitialized|hazard|Race reported|Barrier|error|Error", line) for line in lines)
