"""A result of gpu_acceptance.py as Markdown. Nothing is in it that is not in the JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_KERNELS = 3  # of a family, the longest first


def caption(result: dict[str, Any]) -> str:
    """The card's name and the versions."""
    machine = result["machine"]
    packages, smi = machine.get("packages", {}), machine.get("nvidia_smi", {})
    facts = [
        machine.get("device") or "no device",
        _named("driver", smi.get("driver_version")),
        _named("torch", packages.get("torch")),
        _named("CUDA", machine.get("torch_cuda")),
        _named("Triton", packages.get("triton")),
        _named("Python", machine.get("python")),
        _named("commit", machine["commit"]) if machine.get("commit") else _named("sources", machine.get("sources")),
        (machine.get("date") or "")[:10],
    ]
    text = ", ".join(filter(None, facts))
    return f"{text}. A DRY RUN on a fake device: no number is a measurement" if result["fake"] else text


def _named(name: str, value: Any) -> str:
    return f"{name} {value}" if value else ""


def markdown(result: dict[str, Any], pictures: Sequence[str] = ()) -> str:
    """All tables, and links to the pictures."""
    data = {entry["stage"]: entry["data"] for entry in result["stages"]}
    parts = [f"Measured by `make gpu` on {caption(result)}.", _stages(result)]
    parts += [*_correct(data), *_ceilings(data), *_bench(data), *_linear(data), *_profile(data)]
    parts += [f"![{caption(result)}]({name})" for name in pictures]
    return "\n\n".join(part for part in parts if part)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _stages(result: dict[str, Any]) -> str:
    rows = [(e["stage"], e["status"], e["seconds"], e["reason"][:200]) for e in result["stages"]]
    return table(("stage", "ended", "seconds", ""), rows)


# ---- what is right ---------------------------------------------------------------------------------------------------


def _correct(data: dict[str, Any]) -> Iterator[str]:
    rows: list[tuple[Any, ...]] = []
    if checks := data.get("smoke"):
        bad = [name for name, value in checks.items() if not value.get("ok")]
        rows.append(("smoke, beside float64", len(checks), len(bad), "; ".join(bad[:10])))
    if summary := data.get("tests", {}).get("summary"):
        ran = sum(summary.get(name, 0) for name in ("passed", "failed", "error"))
        failures = summary.get("failures", {})
        notes = [summary.get("error", ""), *list(failures)[:10]]
        rows.append(("pytest -m gpu", ran, len(failures), "; ".join(filter(None, notes))))
    for name, found in data.get("sanitizer", {}).items():
        note = found.get("error") or "; ".join(found.get("reports", [])[:2])
        rows.append((f"compute-sanitizer, {name}", None, found.get("errors"), note[:300]))
    if rows:
        yield "### What is right there"
        yield table(("check", "of", "failed", ""), rows)


def _ceilings(data: dict[str, Any]) -> Iterator[str]:
    found = data.get("smoke", {}).get("ceilings", {})
    if found.get("ok"):
        copy, matmul = _cell(found["copy_gb_per_s"]), _cell(found["matmul_tflop_per_s"])
        yield f"A copy moves {copy} GB/s there (bytes read and written), a bfloat16 matmul computes {matmul} TFLOP/s."


# ---- times -----------------------------------------------------------------------------------------------------------


def bench_cases(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of all reports of the stage `bench`."""
    reports = [value for value in data.get("bench", {}).values() if "cases" in value]
    return [case for report in reports for case in report["cases"]]


def _bench(data: dict[str, Any]) -> Iterator[str]:
    rows = []
    for case in bench_cases(data):
        median, work = case["median_ms"], "TFLOP/s" if "flop" in case else "GB/s"
        for regime, label in case["fastloss"].items():
            ratios = case["ratios"][regime]
            rate = ratios.get("gb_per_s") or (ratios.get("gflop_per_s") or 0) / 1e3
            others = [median.get(name) for name in ("torch", "torch.compile", "liger", "floor")]
            rows.append(
                (case["name"], label, median.get(regime), *others, ratios["share_of_floor"], f"{_cell(rate)} {work}")
            )
    if rows:
        yield "### The losses, milliseconds"
        header = ("case", "backend", "fastloss", "torch", "torch.compile", "Liger", "floor", "share of the floor", "")
        yield table(header, rows)
        yield "The floor: a copy of the logits, or the matmuls, timed in the same rounds. Medians."
    missing = {name: why for value in data.get("bench", {}).values() for name, why in value.get("skipped", {}).items()}
    if missing:
        yield "Not measured: " + "; ".join(f"{name}: {why}" for name, why in missing.items()) + "."


def _linear(data: dict[str, Any]) -> Iterator[str]:
    for shape, found in data.get("linear", {}).items():
        if not found.get("alternatives"):
            continue
        floor = found["alternatives"].get("floor", {}).get("median_ms")
        rows = []
        for name, one in sorted(
            found["alternatives"].items(), key=lambda item: item[1].get("median_ms") or float("inf")
        ):
            ms, peak = one.get("median_ms"), one.get("peak_extra_bytes")
            share = floor / ms if floor and ms else None
            rows.append((name, ms, share, None if peak is None else peak / 2**20))
        yield f"### From hidden states: N x H x V = {shape}, {found['dtype']}, forward and backward"
        header = ("", "milliseconds", "share of the floor", "MiB at the peak, beyond inputs and gradients")
        yield table(header, rows)
        rounds = f"Medians of {found['rounds']} interleaved rounds; the floor is the three matmuls."
        left_out = "; ".join(f"{name}: {why}" for name, why in found.get("skipped", {}).items())
        yield f"{rounds} Not measured: {left_out}." if left_out else rounds


def _profile(data: dict[str, Any]) -> Iterator[str]:
    rows = []
    for name, found in data.get("profile", {}).items():
        for family, kernels in found.get("families", {}).items():
            longest = sorted(kernels, key=lambda kernel: -kernel.get("gpu__time_duration.sum", 0))[:_KERNELS]
            rows += [(name, family, *_kernel(kernel)) for kernel in longest]
    if rows:
        yield "### Kernels"
        header = ("", "loss", "kernel", "µs", "GB/s of DRAM", "warps active, %", "stalls a warp waits for")
        yield table(header, rows)
    notes = {found["without_ncu"] for found in data.get("profile", {}).values() if found.get("without_ncu")}
    yield from (f"Times by torch.profiler, without counters: {note}" for note in sorted(notes))


def _kernel(kernel: dict[str, Any]) -> tuple[Any, ...]:
    ns = kernel.get("gpu__time_duration.sum")
    stalls = list(kernel.get("stalls", {}).items())[:3]
    return (
        f"`{kernel['kernel'][:60]}`",
        None if ns is None else ns / 1e3,
        kernel.get("dram_gb_per_s"),
        kernel.get("sm__warps_active.avg.pct_of_peak_sustained_active"),
        ", ".join(f"{reason} {value:.2f}" for reason, value in stalls),
    )
