"""``benchmark.py pretrain``: one training step of the target against transformers and megatron-core's unfused layers.

Same architecture, same tokens, same precision; times in one process, in turns; peaks in a process per case. The memory
of a case is the high-water mark of a step above what the process held before the model was made: weights, gradients,
optimizer state and activations. A case whose process dies, for want of memory, has null figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from megatron_bliss.base import parallel
from megatron_bliss.config.models import ModelConfig, TargetConfig
from megatron_bliss.config.platform import PlatformConfig
from megatron_bliss.models.presets import PRESETS, flops_per_token, resolve_architecture
from megatron_bliss.target.throughput import peak_flops
from tools.benchmarks import measure
from tools.benchmarks.measure import Peak
from tools.benchmarks.pretrain_cases import CASES, Settings

LABELS = {
    "ours": "megatron_bliss",
    "huggingface": "transformers, SDPA, fused AdamW",
    "unfused": "megatron-core, own local layers",
}
HEADER = ("case", "tokens/s", "seconds a step", "memory MiB", "of it between steps", "utilisation")
PROMISED = (
    "tokens_per_second_vs_huggingface",
    "tokens_per_second_vs_unfused",
    "peak_vs_huggingface",
    "model_flops_utilisation",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options; the defaults are the reference case on a CPU."""
    add = parser.add_argument
    add("--preset", default="pythia-70m", choices=list(PRESETS), help="architecture")
    add("--num-layers", type=int, help="instead of the preset's")
    add("--hidden-size", type=int, help="instead of the preset's")
    add("--num-attention-heads", type=int, help="instead of the preset's")
    add("--vocab", type=int, default=50304, help="vocabulary size")
    add("--seq", type=int, default=512, help="sequence length in tokens")
    add("--micro-batch-size", type=int, default=4, help="samples of one forward pass")
    add("--micro-batches", type=int, default=1, help="forward passes of one step")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="precision of the passes; master weights are fp32")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where")
    add("--deterministic", action="store_true", help="deterministic kernels, as platform.deterministic, for all cases")
    add("--repetitions", type=int, default=5, help="times each case is timed, after two calls to warm up")
    add("--peak-tflops", type=float, help="the device's peak for the utilisation (default: known for some GPUs)")
    add("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="what to measure")
    add("--no-memory", action="store_true", help="times alone")
    add("--no-time", action="store_true", help="peaks alone")
    add("--peak-of", choices=list(CASES), help="print the peak of one case, in this process")


def run(options: argparse.Namespace) -> dict | None:
    """Measure all cases; returns the result, or None when this process only measured one case's peak."""
    _check(options)
    settings = _settings(options)
    if options.peak_of:
        print(json.dumps(measure_case(options.peak_of, settings, options)._asdict()))
        return None
    peaks = {} if options.no_memory else {name: _peak_in_child(name, options) for name in options.cases}
    names = [name for name in options.cases if options.no_memory or peaks[name] is not None]
    machine = measure.machine(torch.device(options.device))
    times, losses = ({}, {}) if options.no_time else _times(names, settings, options)
    speeds = {name: settings.tokens / statistics.median(values) for name, values in times.items()}
    totals = {name: peak.peak + peak.held for name, peak in peaks.items() if peak is not None}
    device_flops = _peak_flops(options)
    flops = 3 * flops_per_token(settings.arch, settings.seq)
    utilisation = {name: speed * flops / device_flops for name, speed in speeds.items()} if device_flops else {}
    return {
        "machine": machine,
        "model": _describe(options),
        "tokens_per_second_vs_huggingface": _paired_ratio(times, "huggingface"),
        "tokens_per_second_vs_unfused": _paired_ratio(times, "unfused"),
        "peak_vs_huggingface": _ratio(totals, "ours", "huggingface"),
        "model_flops_utilisation": utilisation.get("ours"),
        "peak_vs_unfused": _ratio(totals, "ours", "unfused"),
        "utilisation": utilisation,
        "tokens_per_second": speeds,
        "first_loss": losses,
        "times": {name: [round(value, 6) for value in values] for name, values in times.items()},
        "peaks": {name: None if peak is None else peak._asdict() for name, peak in peaks.items()},
    }


def measure_case(name: str, settings: Settings, options: argparse.Namespace) -> Peak:
    """The peak of one case's step in this process; ``held`` is what model and optimizer hold between two steps."""
    groups = _groups(options)
    try:
        from transformers import GPTNeoXForCausalLM, LlamaForCausalLM  # noqa: F401 (libraries count for no case)

        if options.device == "cpu":
            measure.return_freed_memory()
        before = measure.held_now(groups.device)
        peak = measure.measure_peak(CASES[name](settings, groups), groups.device)
    finally:
        parallel.destroy()
    return Peak(peak.peak, peak.held - before)


def _times(
    names: list[str], settings: Settings, options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every case's steps, and the loss of its first one (they differ: each draws its own weights)."""
    groups = _groups(options)
    try:
        steps = {name: CASES[name](settings, groups) for name in names}
        losses = {name: step() for name, step in steps.items()}
        for step in steps.values():
            step()
        _note(f"{options.repetitions} repetitions of {', '.join(names)} in turns")
        times = measure.interleaved_times(steps, options.repetitions, groups.device)
    finally:
        steps = None
        gc.collect()
        parallel.destroy()
    return times, losses


def _groups(options: argparse.Namespace) -> parallel.Groups:
    platform = PlatformConfig(device=options.device, params_dtype=options.dtype, deterministic=options.deterministic)
    return parallel.initialize(platform, TargetConfig(), seed=1)


def _peak_in_child(name: str, options: argparse.Namespace) -> Peak | None:
    """The peak of one case in a fresh process; None when it did not survive."""
    _note(f"peak of {name}")
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmark.py"), "pretrain", "--peak-of", name]
    for option in ("preset", "num_layers", "hidden_size", "num_attention_heads", "vocab", "seq", "dtype", "device"):
        if getattr(options, option) is not None:
            command += ["--" + option.replace("_", "-"), str(getattr(options, option))]
    command += ["--micro-batch-size", str(options.micro_batch_size), "--micro-batches", str(options.micro_batches)]
    command += ["--deterministic"] if options.deterministic else []
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | measure.ALLOCATOR
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Peak(**json.loads(done.stdout.splitlines()[-1]))
    lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
    _note(f"{name} did not finish: {lines[-1]}")
    if done.returncode > 0 and "memory" not in lines[-1].lower():
        raise ValueError(f"found a failure of {name} other than for want of memory: {lines[-1]}")
    return None


def _check(options: argparse.Namespace) -> None:
    for name in ("repetitions", "seq", "micro_batch_size", "micro_batches"):
        if getattr(options, name) < 1:
            raise ValueError(f"found --{name.replace('_', '-')} {getattr(options, name)}, expected at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("found --device cuda without a CUDA device, expected one: use --device cpu")


def _settings(options: argparse.Namespace) -> Settings:
    sizes = {name: getattr(options, name) for name in ("num_layers", "hidden_size", "num_attention_heads")}
    arch = resolve_architecture(ModelConfig(preset=options.preset, **sizes), options.vocab)
    return Settings(arch, options.seq, options.micro_batch_size, options.micro_batches, options.dtype)


def _describe(options: argparse.Namespace) -> str:
    names = ("num_layers", "hidden_size", "num_attention_heads")
    changed = [f"{name}={getattr(options, name)}" for name in names if getattr(options, name) is not None]
    batch = f"{options.micro_batches} x {options.micro_batch_size} x {options.seq} tokens, {options.dtype}"
    return f"{' '.join([options.preset, *changed])}, vocabulary {options.vocab:,}, {batch}"


def _peak_flops(options: argparse.Namespace) -> float | None:
    """The device's peak in FLOP/s; None where nobody knows."""
    platform = PlatformConfig(device=options.device, params_dtype=options.dtype)
    return peak_flops(platform, torch.device(options.device), options.peak_tflops or 0.0)


def _paired_ratio(times: dict[str, list[float]], peer: str) -> float | None:
    """Median over repetitions of the peer's time / ours: neighbours in time saw the same machine."""
    if peer not in times or "ours" not in times:
        return None
    return statistics.median(b / a for a, b in zip(times["ours"], times[peer], strict=True))


def _ratio(values: dict[str, float], numerator: str, denominator: str) -> float | None:
    if numerator not in values or not values.get(denominator):
        return None
    return values[numerator] / values[denominator]


def _note(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def markdown(result: dict, command: str) -> str:
    """The result as a page."""
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result["machine"].items())
    parts = [
        "# A training step of the target",
        f"`{command}`\n\n{machine}.",
        __doc__.split("\n\n", 1)[1].strip().replace("\n", " "),
        f"## {result['model']}",
        _table(HEADER, _rows(result)),
        _table(("figure", "ratio"), [(name, _number(result[name], "{:.3f}")) for name in PROMISED]),
    ]
    return "\n\n".join(parts) + "\n"


def _rows(result: dict) -> list[tuple[str, ...]]:
    rows = []
    for name, label in LABELS.items():
        times, peak = result["times"].get(name), result["peaks"].get(name)
        if not times and not peak:
            continue
        seconds = f"{statistics.median(times):.3f} ({min(times):.3f}-{max(times):.3f})" if times else ""
        memory = [f"{size / 2**20:,.0f}" for size in (peak["peak"] + peak["held"], peak["held"])] if peak else ["", ""]
        speed = _number(result["tokens_per_second"].get(name), "{:,.0f}")
        rows.append((label, speed, seconds, *memory, _number(result["utilisation"].get(name), "{:.1%}")))
    return rows


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _table(header: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [header, ("---",) + ("---:",) * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
