"""``benchmark.py bilevel``: the bilevel engine against a plain gradient, double backward and the published scheme.

Same model, same batch; times in one process, in turns; peaks in a process per case (measure.py). A case whose process
dies, for want of memory, is left out of the timing and its figures are null.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path

import torch

from megatron_bliss.config.models import ModelConfig
from tools.benchmarks import cases, measure
from tools.benchmarks.cases import CASES, Problem, Settings
from tools.benchmarks.measure import Peak

DEFAULT_CASES = [name for name in CASES if not name.endswith("_compiled")]
"""Compiled cases need a compiler, so they are asked for by name."""
Times = dict[str, list[float]]
Peaks = dict[str, Peak]

TIME_FIGURES = {
    "double_backward_time_vs_gradient": ("double_backward", "gradient"),
    "engine_gradient_time_vs_gradient": ("engine_gradient", "gradient"),
    "hessian_time_vs_gradient": ("hessian", "gradient"),
    "hessian_kept_time_vs_gradient": ("hessian_kept", "gradient"),
    "gauss_newton_time_vs_gradient": ("gauss_newton", "gradient"),
    "step_time_vs_gradient": ("step", "gradient"),
    "time_with_limit": ("step_limited", "step"),
    "compiled_hessian_time_vs_gradient": ("hessian_compiled", "gradient"),
    "compiled_gauss_newton_time_vs_gradient": ("gauss_newton_compiled", "gradient"),
    "compiled_step_time": ("step_compiled", "step"),
    "upper_step_speedup": ("published_step", "step"),
}
"""Figure -> (case above the line, case below it)."""
PEAK_FIGURES = {
    "peak_vs_gradient": ("step", "gradient"),
    "peak_vs_published": ("step", "published_step"),
    "peak_with_limit_vs_gradient": ("step_limited", "gradient"),
    "hessian_peak_vs_gradient": ("hessian", "gradient"),
    "hessian_kept_peak_vs_gradient": ("hessian_kept", "gradient"),
    "gauss_newton_peak_vs_gradient": ("gauss_newton", "gradient"),
    "double_backward_peak_vs_gradient": ("double_backward", "gradient"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options; the defaults are the reference case."""
    add = parser.add_argument
    add("--preset", default="pythia-31m", help="architecture of proxy and score model")
    add("--num-layers", type=int, help="instead of the preset's")
    add("--hidden-size", type=int, help="instead of the preset's")
    add("--num-attention-heads", type=int, help="instead of the preset's")
    add("--vocab", type=int, nargs="+", default=[50304], help="vocabulary sizes")
    add("--seq", type=int, nargs="+", default=[1024], help="sequence lengths in tokens")
    add("--batch", type=int, nargs="+", default=[4], help="batch sizes in samples")
    add("--memory-limit-gib", type=float, default=0.5, help="bilevel.memory_limit_gib of the step with a memory limit")
    add("--teacher", help="preset of a frozen target: whole steps then have the KL term (default: none)")
    add("--device", default="cpu", help="cpu or cuda")
    add("--repetitions", type=int, default=3, help="times each case is timed, after one call to warm up")
    add("--cases", nargs="+", choices=list(CASES), default=DEFAULT_CASES, help="what to measure")
    add("--no-memory", action="store_true", help="times alone")
    add("--no-time", action="store_true", help="peaks alone")
    add("--allocator", choices=["returning", "default"], default="returning", help="for peaks on a CPU, see measure.py")
    add("--peak-of", choices=list(CASES), help="print the peak of one case, in this process with its allocator")


def run(options: argparse.Namespace) -> dict | None:
    """Measure the whole grid; returns the result, or None when this process only measured one case's peak."""
    if options.repetitions < 1:
        raise ValueError(f"found --repetitions {options.repetitions}, expected at least 1")
    grid = [_settings(options, *point) for point in product(options.vocab, options.seq, options.batch)]
    if options.peak_of:
        print(json.dumps(measure_case(options.peak_of, grid[0])._asdict()))
        return None
    result = {"machine": measure.machine(torch.device(options.device)), "model": _describe_model(options)}
    result |= {"allocator": options.allocator, "cases": []}
    for settings in grid:
        result["cases"].append(measure_point(settings, options))
    return result


def measure_case(name: str, settings: Settings) -> Peak:
    """The peak of one case in this process."""
    return measure.measure_peak(CASES[name](Problem(settings)), settings.device)


def measure_point(settings: Settings, options: argparse.Namespace) -> dict:
    """All figures of one grid point, and under ``times`` and ``peaks`` what they were made of."""
    peaks: Peaks = {}
    if not options.no_memory:
        found = {name: _peak_in_child(name, settings, options) for name in options.cases}
        peaks = {name: peak for name, peak in found.items() if peak is not None}
    names = [name for name in options.cases if options.no_memory or name in peaks]
    times, errors = ({}, {}) if options.no_time else _times_and_errors(settings, names, options.repetitions)
    medians = {name: statistics.median(values) for name, values in times.items()}
    above_held = {name: peak.peak for name, peak in peaks.items()}
    return {
        "vocab": settings.vocab,
        "seq": settings.seq,
        "batch": settings.batch,
        "relative_error": errors.pop("relative_error", None),
        **{figure: _ratio(above_held, *pair) for figure, pair in PEAK_FIGURES.items()},
        **{figure: _ratio(medians, *pair) for figure, pair in TIME_FIGURES.items()},
        **errors,
        "teacher": settings.teacher,
        "memory_limit_gib": settings.memory_limit_gib,
        "times": {name: [round(value, 6) for value in values] for name, values in times.items()},
        "peaks": {name: peak._asdict() for name, peak in peaks.items()},
    }


def _times_and_errors(settings: Settings, names: list[str], repetitions: int) -> tuple[Times, dict[str, float]]:
    problem = Problem(settings)
    ready = {name: CASES[name](problem) for name in names}
    errors, first = cases.errors_against_fp64(problem), {}
    for name, call in ready.items():
        _note(settings, f"warm-up of {name}")
        result = call()
        if name in ("hessian", "double_backward"):
            first[name] = result
        del result
    if len(first) == 2:
        errors["relative_error"] = cases.error_against_double_backward(first["hessian"], first["double_backward"])
    else:
        errors["relative_error"] = errors["relative_error_fp64"]
    first.clear()
    _note(settings, f"{repetitions} repetitions of {len(ready)} cases in turns")
    return measure.interleaved_times(ready, repetitions, settings.device), errors


def _peak_in_child(name: str, settings: Settings, options: argparse.Namespace) -> Peak | None:
    """The peak of one case in a fresh process; None when it did not survive."""
    _note(settings, f"peak of {name}")
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmark.py"), "bilevel", "--peak-of", name]
    command += ["--preset", options.preset, "--device", options.device]
    for option in ("num_layers", "hidden_size", "num_attention_heads", "teacher", "memory_limit_gib"):
        if getattr(options, option) is not None:
            command += ["--" + option.replace("_", "-"), str(getattr(options, option))]
    command += ["--vocab", str(settings.vocab), "--seq", str(settings.seq), "--batch", str(settings.batch)]
    environment = measure.child_environment(options.allocator == "returning")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Peak(**json.loads(done.stdout))
    lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
    _note(settings, f"{name} did not finish: {lines[-1]}")
    if done.returncode > 0 and "memory" not in lines[-1].lower():
        raise ValueError(f"found a failure of {name} other than for want of memory: {lines[-1]}")
    return None


def _settings(options: argparse.Namespace, vocab: int, seq: int, batch: int) -> Settings:
    if seq < 2 or batch < 1:
        raise ValueError(f"found --seq {seq} --batch {batch}, expected at least 2 tokens and 1 sample")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("found --device cuda without a CUDA device, expected one: use --device cpu")
    sizes = {name: getattr(options, name) for name in ("num_layers", "hidden_size", "num_attention_heads")}
    model = ModelConfig(preset=options.preset, **sizes)
    return Settings(model, vocab, seq, batch, device, options.memory_limit_gib, options.teacher)


def _describe_model(options: argparse.Namespace) -> str:
    changed = [
        f"{name}={getattr(options, name)}"
        for name in ("num_layers", "hidden_size", "num_attention_heads")
        if getattr(options, name) is not None
    ]
    return " ".join([options.preset, *changed])


def _ratio(values: dict[str, float], numerator: str, denominator: str) -> float | None:
    if numerator not in values or not values.get(denominator):
        return None
    return values[numerator] / values[denominator]


def _note(settings: Settings, text: str) -> None:
    """Progress, on standard error."""
    print(f"[{settings.vocab} x {settings.batch} x {settings.seq}] {text}", file=sys.stderr, flush=True)
