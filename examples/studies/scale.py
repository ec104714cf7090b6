"""What BLISS runs of growing targets take on growing machines, by tools/plan.py's own numbers, and what breaks first.

Every cell is a plan of a launch configuration of examples/ with the paper's bilevel stage (examples/c4/paper.yaml), the
arm bliss and four rounds; nothing is run. Batches grow with the tokens, and micro-batches shrink where there are many
replicas.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bliss.base.files import atomic_file, write_json
from megatron_bliss.base.text import format_bytes
from megatron_bliss.plan.plan import Machine, make_plan
from megatron_bliss.plan.sharing import busy_share
from megatron_bliss.run.options import parse_options
from megatron_bliss.selection.score_pass import BLOCK_UNITS

EXAMPLES = Path(__file__).parents[1]
TARGETS = {
    "410m": "pythia_410m_c4",
    "1b": "pythia_1b_c4",
    "2.8b": "pythia_2p8b_c4",
    "6.9b": "pythia_6p9b_c4",
    "13b": "llama_13b_c4",
    "70b": "llama_70b_c4",
}
SENSIBLE = {"410m": 64, "1b": 64, "2.8b": 64, "6.9b": 256, "13b": 256, "70b": 1024}
"""GPUs for which stages, disk, traffic and storage are shown."""
BATCHES = {26_214_400_000: 512, 100_000_000_000: 2048, 1_000_000_000_000: 4096}
"""Tokens that the target trains on -> sequences of an iteration: the paper's, and 2 and 4 million tokens."""
ROUNDS, LENGTH, NODE = 4, 1024, 8
NVLINK, NETWORK = 450e9, 50e9
"""Bytes a second that a device sends inside a node of eight (NVLink 4), and its network card outside (400 Gb/s)."""
TOKEN_BYTES, INDEX_BYTES = 2, 20
"""Of a corpus: ids below 65,500, and an entry of the index for each unit."""
STAGES = ("warmup target", "warmup proxy", "bilevel", "score", "pretrain", "decay_branch", "warmup decay_branch")
DAY, GIB = 86400, 2**30


@dataclass(frozen=True)
class Cell:
    """One plan: a target on so many GPUs for so many tokens, or why there is none."""

    target: str
    gpus: int
    tokens: int
    plan: dict | None
    refusal: str = ""
    batch: int = 0
    save_interval: int = 0
    chunks: int = 1

    def seconds(self, *stages: str) -> float:
        """Of stages over all rounds; of all without a name."""
        return sum(one["seconds"] for one in self.plan["stages"] if not stages or one["stage"] in stages)

    @property
    def days(self) -> float:
        """Of the whole run."""
        return self.seconds() / DAY

    @property
    def iteration(self) -> float:
        """Seconds of an iteration of the target's training."""
        return self.seconds("pretrain") * self.batch * LENGTH / (self.tokens * ROUNDS / (ROUNDS + 1))

    def memory(self, stage: str) -> float:
        """GiB of the rank that holds most in a stage."""
        return next(one["total"] for one in self.plan["memory"]["stages"] if one["stage"] == stage) / GIB

    def sent(self, stage: str, *among: str) -> int:
        """Bytes that a rank sends in a step of a stage, among the groups named."""
        flows = next(one["flows"] for one in self.plan["traffic"] if one["stage"] == stage)
        return sum(flow["bytes"] for flow in flows if flow["among"] in among)


def planned(target: str, gpus: int, tokens: int, machine: Callable[[int], Machine]) -> Cell:
    """The plan of a cell with the largest micro-batch, up to the example's, that the batch can be divided into."""
    batch, files = BATCHES[tokens], [EXAMPLES / TARGETS[target] / "config.yaml", EXAMPLES / "c4/paper.yaml"]
    iterations = tokens // ((ROUNDS + 1) * batch * LENGTH)
    options = [word for path in files for word in ("--config", str(path))]
    options += ["--run_folder", "runs/planned", "--arms", "bliss", "--rounds", str(ROUNDS)]
    options += ["--pretraining.global_batch_size", str(batch), "--pretraining.warmup_iters", str(iterations)]
    options += ["--pretraining.train_iters", str(iterations)]
    size, refusal = parse_options(options).pretraining.micro_batch_size, ""
    while size:
        config = parse_options([*options, "--pretraining.micro_batch_size", str(size)])
        try:
            plan = make_plan(config, machine(gpus))
            sizes = batch, config.checkpoint.save_interval, config.target.virtual_pipeline_model_parallel_size
            return Cell(target, gpus, tokens, plan, "", *sizes)
        except ValueError as error:
            size, refusal = size // 2, str(error)
    return Cell(target, gpus, tokens, None, refusal)


def losses(cell: Cell) -> dict[str, float]:
    """What a run loses, each as a share of the time of its steps, if none of it were hidden behind work.

    selection: proxy's warm-up, bilevel and score stages, of the whole run. tensor: at NVLINK. pipeline: at NETWORK.
    data: a ring leaves a node once and has the network cards of all its ranks there, as many as a node's devices /
    tensor-parallel size. bubble: (P - 1) / (micro-batches x chunks). On one node all are at NVLINK.
    """
    layout, iteration, alone = cell.plan["layout"], cell.iteration, cell.gpus <= NODE
    stages, in_node = layout["pipeline_model_parallel_size"], NODE // layout["tensor_model_parallel_size"]
    rates = {"tensor": NVLINK, "data": min(NVLINK, NETWORK * in_node), "pipeline": NETWORK}
    found = {"selection": cell.seconds("warmup proxy", "bilevel", "score") / cell.seconds()}
    for among, rate in rates.items():
        found[among] = cell.sent("target training", among) / (NVLINK if alone else rate) / iteration
    return found | {"bubble": (stages - 1) / (layout["micro_batches"] * cell.chunks)}


CHANGES = {
    "selection": "bilevel and proxy batches of as many samples as GPUs with as many fewer steps, or scores from counts",
    "tensor": "half of tensor_model_parallel_size, where memory allows, or twice the stages for it",
    "data": "a larger global_batch_size, or fewer GPUs",
    "pipeline": "a smaller virtual_pipeline_model_parallel_size",
    "bubble": "a larger global_batch_size, or a larger virtual_pipeline_model_parallel_size",
}


def breaks(cell: Cell) -> str:
    """What breaks first: a refusal, memory, or else the largest loss."""
    if cell.plan is None:
        return "refused"
    if not cell.plan["memory"]["fits"]:
        return "memory"
    found = losses(cell)
    worst = max(found, key=found.get)
    return f"{worst} {percent(found[worst])}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def day(cell: Cell) -> str:
    """Days with three digits, or why there are none."""
    if cell.plan is None:
        return "refused"
    return f"{cell.days:,.3g}" if cell.plan["memory"]["fits"] else "does not fit"


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"


def billions(tokens: int) -> str:
    """Tokens in billions."""
    return f"{tokens / 1e9:,.0f} B"


def start(cell: Cell) -> list[str]:
    """The first cells of a row."""
    return [cell.target, f"{cell.gpus:,}", billions(cell.tokens)]


def whole_runs(cells: Sequence[Cell], amounts: Sequence[int]) -> Iterator[str]:
    """Days, the share of selection, and what breaks first: a line for each target and number of GPUs."""
    found = {(cell.target, cell.gpus, cell.tokens): cell for cell in cells}
    days, first = [], []
    for target, gpus in dict.fromkeys((cell.target, cell.gpus) for cell in cells):
        own = [found[target, gpus, amount] for amount in amounts]
        shares = ["-" if one.plan is None else percent(losses(one)["selection"]) for one in own]
        days.append([target, f"{gpus:,}", *map(day, own), *shares])
        first.append([target, f"{gpus:,}", *map(breaks, own)])
    named = list(map(billions, amounts))
    yield "## Days of a run, and the share of selection in them"
    yield table(["target", "GPUs", *(f"days, {one}" for one in named), *(f"selection, {one}" for one in named)], days)
    yield "## What breaks first"
    yield table(["target", "GPUs", *named], first)
    kinds = sorted({one.split()[0] for row in first for one in row[2:]} & set(CHANGES))
    yield "\n".join(f"* {kind}: {CHANGES[kind]}" for kind in kinds)
    refused = dict.fromkeys((cell.target, cell.refusal) for cell in cells if cell.plan is None)
    yield "\n".join(f"* {target}, refused: {text}" for target, text in refused)


def stage_tables(cells: Sequence[Cell]) -> Iterator[str]:
    """Hours of each stage, memory of a rank, and disk."""
    shown = sensible(cells)
    yield "## Hours of each stage"
    rows = [[*start(one), *_hours(one), f"{one.days * 24 * one.gpus:,.0f}"] for one in shown]
    yield table(["target", "GPUs", "tokens", *STAGES[:5], "decay branches", "GPU-hours"], rows)
    yield "## Memory of the rank that holds most, GiB"
    least = min(cell.tokens for cell in cells)
    rows = [
        [
            one.target,
            f"{one.gpus:,}",
            _layout(one),
            *(f"{one.memory(stage):.1f}" for stage in ("target training", "bilevel")),
        ]
        for one in cells
        if one.plan and one.tokens == least
    ]
    yield table(["target", "GPUs", "tensor x pipeline x data", "target training", "bilevel"], rows)
    yield "## Disk"
    rows = [[one.target, billions(one.tokens), *map(format_bytes, disk(one).values())] for one in shown]
    yield table(["target", "tokens", *(disk(shown[0]) if shown else [])], rows)


def sensible(cells: Sequence[Cell]) -> list[Cell]:
    """Cells that have a plan, of each target's SENSIBLE number of GPUs, or of the largest there is."""
    planned_cells = [cell for cell in cells if cell.plan]
    most = {cell.target: max(one.gpus for one in planned_cells if one.target == cell.target) for cell in planned_cells}
    there = {(cell.target, cell.gpus) for cell in planned_cells}
    wanted = {name: SENSIBLE[name] if (name, SENSIBLE[name]) in there else gpus for name, gpus in most.items()}
    return [cell for cell in planned_cells if cell.gpus == wanted[cell.target]]


def _hours(cell: Cell) -> list[str]:
    parts = [*((stage,) for stage in STAGES[:5]), STAGES[5:]]
    return [f"{cell.seconds(*stages) / 3600:,.2f}" for stages in parts]


def _layout(cell: Cell) -> str:
    layout = cell.plan["layout"]
    return " x ".join(str(layout[f"{name}_parallel_size"]) for name in ("tensor_model", "pipeline_model", "data"))


def disk(cell: Cell) -> dict[str, int]:
    """Bytes: corpus with its index, one checkpoint of the target and all that are kept, and what rounds leave."""
    data, found = cell.plan["data"], cell.plan["disk"]
    return {
        "corpus": TOKEN_BYTES * data["tokens"] + INDEX_BYTES * data["units"],
        "a checkpoint": found["checkpoint"],
        "checkpoints": found["parts"]["target checkpoints"],
        **{name: found["parts"][name] for name in ("shards", "scores", "subsets")},
    }


def link_tables(cells: Sequence[Cell]) -> Iterator[str]:
    """What ranks send, and what storage has to give and take."""
    shown = sensible(cells)
    yield "## What the rank that sends most sends in a step"
    header = [*("target", "GPUs", "tokens"), "iteration, s", "tensor", "pipeline", "data", "upper step, sums"]
    header += ["upper step, target", "upper step, host"]
    yield table(header, [[*start(one), f"{one.iteration:.3g}", *_sent(one)] for one in shown])
    yield "## The time that takes, as a share of the step"
    shares = [[*start(one), *map(percent, list(losses(one).values())[1:])] for one in shown]
    yield table(["target", "GPUs", "tokens", "tensor", "data", "pipeline", "bubble"], shares)
    yield "## What storage has to give and take"
    header = ["target", "GPUs", "tokens", "score stage reads, GB/s", "in files", "idle", "minutes to a checkpoint"]
    yield table([*header, "its GB/s"], [[*start(one), *_storage(one)] for one in shown])


def _sent(cell: Cell) -> list[str]:
    training = [cell.sent("target training", among) for among in ("tensor", "pipeline", "data")]
    upper = [cell.sent("bilevel", *among) for among in (("world",), ("tensor", "pipeline"), ("host",))]
    return list(map(format_bytes, training + upper))


def _storage(cell: Cell) -> list[str]:
    """The score stage's reading, its blocks and the ranks that wait for others' last block; checkpoints."""
    shard, between = cell.plan["data"]["rounds"][0], cell.save_interval * cell.iteration
    read = TOKEN_BYTES * shard["tokens"] * ROUNDS / cell.seconds("score")
    blocks = -(-shard["units"] // BLOCK_UNITS)
    idle, written = 1 - busy_share(blocks, cell.gpus), cell.plan["disk"]["checkpoint"] / between
    return [f"{read / 1e9:,.3g}", f"{blocks:,}", percent(idle), f"{between / 60:,.3g}", f"{written / 1e9:,.3g}"]


def record(cell: Cell) -> dict[str, Any]:
    """A cell as JSON."""
    found: dict[str, Any] = {"target": cell.target, "gpus": cell.gpus, "tokens": cell.tokens, "first": breaks(cell)}
    if cell.plan is None:
        return found | {"refusal": cell.refusal}
    kept = ("layout", "stages", "overhead", "memory", "traffic", "data", "disk")
    return found | {"days": cell.days, "losses": losses(cell)} | {name: cell.plan[name] for name in kept}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--targets", nargs="+", default=list(TARGETS), choices=TARGETS, help="sizes of the target")
    add("--gpus", nargs="+", type=int, default=[8, 64, 256, 1024], help="numbers of devices")
    add("--tokens", nargs="+", type=float, default=list(BATCHES), help="that the target trains on in all segments")
    add("--device", default="h100", help="a name that tools/plan.py knows")
    add("--memory-gib", type=float, default=80.0, help="memory of one device")
    add("--mfu", type=float, default=0.4, help="share of the peak that the target's training reaches")
    add("--proxy-mfu", type=float, default=0.1, help="that of proxy and score model")
    add("--output", help="Markdown file to write; the tables are printed in any case")
    add("--json", help="file for the plans")
    options = parser.parse_args(arguments)
    options.tokens = [int(amount) for amount in options.tokens]
    if unknown := set(options.tokens) - set(BATCHES):
        parser.error(f"found --tokens {min(unknown)}, expected some of {', '.join(map(str, BATCHES))}: change --tokens")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Make all plans; returns the exit status."""
    options = parse_arguments(arguments)

    def machine(gpus: int) -> Machine:
        sizes = {"mfu": options.mfu, "proxy_mfu": options.proxy_mfu, "memory_gib": options.memory_gib}
        return Machine(world_size=gpus, device=options.device, **sizes)

    cells = [
        planned(target, gpus, amount, machine)
        for target in options.targets
        for gpus in options.gpus
        for amount in options.tokens
    ]
    parts = [*whole_runs(cells, options.tokens), *stage_tables(cells), *link_tables(cells)]
    page = "\n\n".join(filter(None, parts)) + "\n"
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(options.output, "w") as stream:
            stream.write(page)
    if options.json:
        write_json(options.json, {"cells": [record(cell) for cell in cells]})
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
