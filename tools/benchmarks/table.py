"""The result of ``benchmark.py bilevel`` as Markdown: every figure with its numerator and denominator."""

from __future__ import annotations

import statistics

from tools.benchmarks.bilevel import PEAK_FIGURES, TIME_FIGURES

LABELS = {
    "gradient": "plain autograd gradient (fused attention, whole logits)",
    "double_backward": "Hessian product, reverse over reverse",
    "published_step": "whole upper step, published scheme",
    "engine_gradient": "engine: gradient",
    "hessian": "engine: Hessian product, gradient, influences; recomputed",
    "hessian_kept": "engine: the same, graphs kept",
    "gauss_newton": "engine: Gauss-Newton product, gradient, influences",
    "step": "engine: default whole upper step",
    "step_limited": "engine: the same, memory limit",
    "hessian_compiled": "engine: Hessian product, gradient, influences; recomputed, compiled",
    "gauss_newton_compiled": "engine: Gauss-Newton product, gradient, influences; compiled",
    "step_compiled": "engine: default whole upper step, compiled",
}

METHOD = (
    "Times: median of interleaved repetitions in one process (least to most). Peaks: high-water mark of a process of"
    " its own above what it holds between two steps (parameters, optimiser state, z, the libraries' memory), each case"
    " run once before. The published step is megatron_bliss/bilevel/published.py."
)
ALLOCATORS = {
    "returning": "On a CPU freed blocks of 64 KiB or more go back to the system: the mark counts what is alive.",
    "default": "On a CPU the system's allocator is as it comes: the mark counts freed memory that it hoards, too.",
}


def markdown(result: dict, command: str) -> str:
    """The whole page."""
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result["machine"].items())
    parts = [
        "# Bilevel engine",
        f"`{command}`\n\n{machine}.",
        f"{METHOD} {ALLOCATORS[result['allocator']]}",
    ]
    for case in result["cases"]:
        parts += [_heading(result["model"], case), _operations(case), _figures(case), _errors(case)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(model: str, case: dict) -> str:
    teacher = f", KL to a {case['teacher']} target in whole steps" if case["teacher"] else ""
    return (
        f"## {model}, vocabulary {case['vocab']:,}, batch {case['batch']} x {case['seq']:,} tokens, fp32{teacher}\n\n"
        f"Memory limit: {case['memory_limit_gib']:g} GiB."
    )


def _operations(case: dict) -> str:
    rows = []
    for name, label in LABELS.items():
        if name not in case["times"] and name not in case["peaks"]:
            continue
        times, peak = case["times"].get(name), case["peaks"].get(name)
        seconds = f"{statistics.median(times):.3f} ({min(times):.3f}-{max(times):.3f})" if times else ""
        memory = (_mebibytes(peak["peak"]), _mebibytes(peak["held"])) if peak else ("", "")
        rows.append((label, seconds, *memory))
    return _table(("operation", "seconds", "peak MiB", "held before MiB"), rows)


def _figures(case: dict) -> str:
    medians = {name: statistics.median(values) for name, values in case["times"].items()}
    rows = [_figure(case, key, pair, medians, lambda s: f"{s:.3f} s") for key, pair in TIME_FIGURES.items()]
    peaks = {name: peak["peak"] for name, peak in case["peaks"].items()}
    unit = lambda size: f"{_mebibytes(size)} MiB"  # noqa: E731
    rows += [_figure(case, key, pair, peaks, unit) for key, pair in PEAK_FIGURES.items()]
    return _table(("figure", "numerator", "denominator", "ratio"), [row for row in rows if row])


def _figure(case: dict, key: str, pair: tuple[str, str], values: dict, show) -> tuple | None:
    if case[key] is None:
        return None
    numerator, denominator = (f"{name} {show(values[name])}" for name in pair)
    return key, numerator, denominator, f"{case[key]:.2f}"


def _errors(case: dict) -> str:
    if case["relative_error"] is None:
        return ""
    return (
        f"Hessian product: relative error {case['relative_error']:.1e} against double backward on this batch; on part"
        f" of one sample against fp64 double backward {case['relative_error_fp64']:.1e}, fp32 double backward"
        f" {case['double_backward_error_fp64']:.1e}."
    )


def _table(header: tuple[str, ...], rows: list[tuple]) -> str:
    if not rows:
        return ""
    lines = [header, ("---",) + ("---:",) * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f}"
