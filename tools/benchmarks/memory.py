"""``benchmark.py memory``: the estimate behind ``bilevel.memory_limit_gib`` against measured peaks.

Every point of the grid is one whole upper step under the limit, in a process of its own (measure.py). A limit is kept
where the measured peak is at most the limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import torch

from megatron_bliss.bilevel.memory import GIB, StepShape, plan_step
from megatron_bliss.config.models import ModelConfig
from megatron_bliss.models.presets import resolve_architecture
from tools.benchmarks import measure

POINT = ("preset", "vocab", "seq", "batch", "limit_gib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add = parser.add_argument
    add("--presets", nargs="+", default=["pythia-31m", "pythia-70m"], help="architectures of proxy and score model")
    add("--vocab", type=int, default=50304, help="vocabulary size")
    add("--seq", type=int, default=1024, help="sequence length in tokens")
    add("--batch", type=int, default=8, help="batch size in samples")
    add("--limits", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="bilevel.memory_limit_gib")
    add("--device", default="cpu", help="cpu or cuda")


def run(options: argparse.Namespace) -> dict:
    """Measure the grid; limits that not even one sample keeps are noted as such."""
    points = [measure_point(preset, limit, options) for preset in options.presets for limit in options.limits]
    return {"machine": measure.machine(torch.device(options.device)), "points": points}


def measure_point(preset: str, limit: float, options: argparse.Namespace) -> dict:
    """{preset, vocab, seq, batch, limit_gib, micro_batch_size, recompute, estimated_bytes, measured_bytes}."""
    point = dict(zip(POINT, (preset, options.vocab, options.seq, options.batch, limit), strict=True))
    architecture = resolve_architecture(ModelConfig(preset=preset), options.vocab)
    try:
        plan = plan_step(StepShape(architecture, options.seq, device=options.device), options.batch, limit)
    except ValueError as error:
        return point | {"refused": str(error)}
    print(f"[{preset}, {limit:g} GiB] micro-batch {plan.micro_batch_size}", file=sys.stderr, flush=True)
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmark.py"), "bilevel", "--peak-of", "step_limited"]
    command += ["--preset", preset, "--device", options.device, "--memory-limit-gib", str(limit)]
    command += ["--vocab", str(options.vocab), "--seq", str(options.seq), "--batch", str(options.batch)]
    done = subprocess.run(command, env=measure.child_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"found a failure of {' '.join(command)}: {done.stderr.strip()[-500:]}")
    return point | dataclasses.asdict(plan) | {"measured_bytes": json.loads(done.stdout)["peak"]}


def markdown(result: dict, command: str) -> str:
    """The whole page."""
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result["machine"].items())
    lines = ["# Memory limit of the bilevel step", "", f"`{command}`", "", f"{machine}.", ""]
    lines += ["Peaks of a whole upper step above parameters, optimiser states and z, each in a process of its own.", ""]
    lines += [
        "| model, vocabulary, batch | limit, MiB | micro-batch | blocks | estimated, MiB | measured, MiB | kept |"
    ]
    lines += ["| --- | ---: | ---: | --- | ---: | ---: | --- |"]
    return "\n".join(lines + [_row(point) for point in result["points"]]) + "\n"


def _row(point: dict) -> str:
    where = f"{point['preset']}, {point['vocab']:,}, {point['batch']} x {point['seq']:,}"
    limit = point["limit_gib"] * 1024
    if "refused" in point:
        return f"| {where} | {limit:,.0f} | refused: {point['refused']} | | | | |"
    blocks = "recomputed" if point["recompute"] else "kept where small"
    estimated, measured = (point[name] / 2**20 for name in ("estimated_bytes", "measured_bytes"))
    kept = "yes" if point["measured_bytes"] <= point["limit_gib"] * GIB else "**no**"
    size = point["micro_batch_size"]
    return f"| {where} | {limit:,.0f} | {size} | {blocks} | {estimated:,.0f} | {measured:,.0f} | {kept} |"
