"""A plan as text for a terminal: aligned tables, then notes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from megatron_bliss.base.text import align, format_bytes, format_flops, format_seconds

GIB = 2**30
WIDTH = 110
PARTS = ("parameters", "gradients", "optimizer", "working", "total")


def format_plan(plan: Mapping) -> str:
    """The whole plan: layout, what is missing or assumed, work, memory, traffic, data, disk."""
    blocks = [_head(plan), _work(plan), _memory(plan), _traffic(plan["traffic"])]
    blocks += [_data(plan["data"]), _disk(plan["disk"])]
    notes = [("not ready", plan["not_ready"]), ("warning", plan["warnings"]), ("assumed", plan["assumptions"])]
    lines = [_wrapped(f"{kind}: {text}") for kind, texts in notes for text in texts]
    return "\n\n".join([*filter(None, blocks), "\n".join(lines)])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _head(plan: Mapping) -> str:
    layout, device = plan["layout"], plan["machine"]["device"]
    sizes = " x ".join(f"{name} {layout[key]}" for name, key in _SIZES.items())
    models = ", ".join(f"{name} {model['parameters']:,}" for name, model in plan["models"].items())
    ranks = f"{layout['world_size']} rank{'s' * (layout['world_size'] > 1)}" + (f" of {device}" if device else "")
    return f"{ranks}: {sizes}, {layout['micro_batches']} micro-batches an iteration\nparameters: {models}"


_SIZES = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "data": "data_parallel_size",
}


def _work(plan: Mapping) -> str:
    """A line per stage and arm, one per arm, and what selection costs."""
    groups: dict[tuple[str, str], list[Mapping]] = {}
    for record in plan["stages"]:
        groups.setdefault((record["arm"], record["stage"]), []).append(record)
    rows = []
    for arm, total in plan["arms"].items():
        own = {stage: records for (name, stage), records in groups.items() if name == arm}
        rows += [[arm, stage, str(len(records)), *_cost(records)] for stage, records in own.items()]
        rows.append([arm, "all", str(sum(map(len, own.values()))), *_cost([total])])
    rows.append(["total", "", str(len(plan["stages"])), *_cost([plan["total"]])])
    table = align("Work", ["arm", "stage", "runs", "tokens", "work", "time"], rows, left=2)
    hours, overhead = plan["total"]["device_hours"], plan["overhead"]
    lines = [] if hours is None else [f"{hours:,.1f} device hours"]
    if overhead is not None:
        time = "" if overhead["seconds"] is None else f", {overhead['seconds']:+.1%} time"
        lines.append(f"{overhead['arm']} on top of a control arm alone: {overhead['flops']:+.1%} FLOPs{time}")
    return "\n  ".join([table, *lines])


def _cost(records: Sequence[Mapping]) -> list[str]:
    seconds = [record["seconds"] for record in records]
    tokens, flops = (sum(record[key] for record in records) for key in ("tokens", "flops"))
    time = "-" if None in seconds or not sum(seconds) else format_seconds(sum(seconds))
    return [f"{tokens:,}" if tokens else "-", format_flops(flops), time]


def _memory(plan: Mapping) -> str:
    memory, limit = plan["memory"], plan["machine"]["memory_gib"]
    rows = [[entry["stage"], *(f"{entry[part] / GIB:,.2f}" for part in PARTS)] for entry in memory["stages"]]
    table = align("Memory of the rank that holds most, GiB (working: estimated)", ["stage", *PARTS], rows)
    lines = [f"largest: {memory['largest']}"]
    if limit:
        verdict = "every stage fits" if memory["fits"] else "not every stage fits"
        lines[0] += f"; {verdict} in {limit:g} GiB, of which a tenth is left to CUDA, NCCL and the allocator"
    return "\n  ".join([table, *map(_wrapped, [*lines, *memory["advice"]])])


def _traffic(stages: Sequence[Mapping]) -> str:
    """A line per kind of exchange; "" where a rank is alone."""
    rows = []
    for entry in stages:
        rows += [
            [
                f"{entry['stage']}, {entry['step']}",
                flow["what"],
                f"{flow['among']} {flow['ranks']}",
                _sent(flow["bytes"]),
            ]
            for flow in entry["flows"]
        ]
    title = "Traffic: what the rank that sends most sends in a step (ring algorithms)"
    return align(title, ["step", "what", "among", "bytes"], rows, left=3) if rows else ""


def _sent(count: int) -> str:
    """Sizes of a message, from KiB on."""
    return format_bytes(count) if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def _data(data: Mapping) -> str:
    """A line for the warm-up and one per round; rounds that are alike (to the token) share one."""
    found = "" if data["is_there"] else ", assumed"
    title = f"Data: a corpus of {data['units']:,} units and {data['tokens']:,} tokens{found}"
    warmup = data["warmup"]
    rows = [["warm-up", f"{warmup['units']:,}", f"{warmup['tokens']:,}", "-", *_need(warmup)]]
    previous: tuple = ()
    for one in data["rounds"]:
        selected = "not known" if one["selected_tokens"] is None else f"{one['selected_tokens']:,}"
        cells = [f"{one['units']:,}", f"{one['tokens']:,}", selected, *_need(one)]
        if cells == previous:
            rows[-1][0] = f"{rows[-1][0].split(' to ')[0]} to {one['round']}"
        else:
            rows.append([f"round {one['round']}", *cells])
        previous = cells
    table = align(title, ["shard", "units", "tokens", "selected", "needed", "epochs"], rows)
    return f"{table}\n  {_wrapped('selected by ' + data['selection'])}"


def _need(shard: Mapping) -> list[str]:
    epochs = shard["epochs"]
    return [f"{shard['needed_tokens']:,}", "-" if epochs is None else f"{epochs:.2f}"]


def _disk(disk: Mapping) -> str:
    rows = [[name, format_bytes(size)] for name, size in disk["parts"].items()]
    rows[0][0] += f" ({disk['checkpoints']} of {format_bytes(disk['checkpoint'])})"
    return align("Disk", ["kind", "size"], [*rows, ["total", format_bytes(disk["total"])]])
