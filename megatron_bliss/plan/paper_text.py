"""The paper's table of FLOPs beside ours, as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from megatron_bliss.base.text import align
from megatron_bliss.plan.paper import REPORTED, SCHEDULE, UNIT

WIDTH = 110
HEAD = (
    "FLOPs of a whole run in 1e19: as the BLISS paper (arXiv 2510.06048) reports them; N D: by its rule (6 N D\n"
    "where a model is trained, 2 N D where it only reads) from our parameters and tokens; plan: as stages record them"
)
WAYS = "What the paper's numbers would follow from: in 1e19, with = where these are its digits"


def format_paper_table(table: Mapping) -> str:
    """One table per size of the target, then what the paper's numbers would follow from."""
    blocks = [HEAD]
    for size, content in table["sizes"].items():
        rows = [
            [row["stage"], _printed(size, row["stage"]), _cell(row["n_d"]), _cell(row["plan"]), _ratio(row["ratio"])]
            for row in content["rows"]
        ]
        blocks.append(align(f"Target of {size}", ["stage", "paper", "N D", "plan", "plan / paper"], rows))
    return "\n\n".join([*blocks, _ways(table), _implied(table)])


def _printed(size: str, stage: str) -> str:
    return REPORTED[size].get(stage, "-")


def _cell(flops: float | None) -> str:
    return "-" if flops is None else f"{flops / UNIT:.3f}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _ways(table: Mapping) -> str:
    sizes, ways = list(table["sizes"]), table["derivations"]
    names = [f"{one['stage']}: {one['way']}" for one in ways]
    width = max(map(len, names))
    lines = [WAYS, "  " + " " * width + "".join(size.rjust(10) for size in sizes)]
    for name, one in zip(names, ways, strict=True):
        cells = [("= " if one["gives_digits"][size] else "") + _cell(one["flops"][size]) for size in sizes]
        lines.append(f"  {name.ljust(width)}" + "".join(cell.rjust(10) for cell in cells))
    return "\n".join(lines)


def _implied(table: Mapping) -> str:
    """What N the paper's pretraining asks for, and why no sum of a target's parts gives both."""
    implied = ", and ".join(
        f"N = {one['reported'] / 1e6:,.1f}M for {size}, where Pythia has {one['counted'] / 1e6:,.1f}M"
        for size, one in table["implied_parameters"].items()
    )
    ratios = table["ratios"]
    grown = ", ".join(f"{name} by {ratio:.2f}" for name, ratio in ratios.items() if name != "paper")
    texts = [
        f"Pretraining by 6 N D over {SCHEDULE.target_tokens / 1e9:.1f}B tokens asks for {implied}.",
        f"From 410M to 1B the paper's pretraining grows by {ratios['paper']:.2f}, and what a target is made of by "
        f"less: {grown}. So no way of counting that adds such parts up alike for both gives both numbers.",
    ]
    return "\n".join(textwrap.fill(text, WIDTH, subsequent_indent="  ") for text in texts)
