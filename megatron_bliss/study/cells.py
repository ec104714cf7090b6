"""Cells and tables of a study's page, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_bliss.study.paired import Compared, Spread


def table(lines: Sequence[Sequence[str]]) -> str:
    """A table; the first line is its head."""
    head, *rows = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def names_in_code(names: Sequence[str]) -> str:
    """Names set off from words."""
    return ", ".join(f"`{name}`" for name in names)


def compared_cell(one: Compared, is_control: bool) -> str:
    """A value, and its difference to the control's, such as "4.822 ± 0.011 (-0.900 ± 0.300; 2/2)"."""
    value, difference = format_spread(one.value), difference_text(one)
    return value if is_control or not difference else f"{value} ({difference})"


def difference_text(one: Compared) -> str:
    """Such as "-0.900 ± 0.300; 2/2", bold where it is worse; empty where there is none."""
    if one.difference.mean is None:
        return ""
    difference = format_spread(one.difference, sign="+")
    if one.difference.mean > 0:
        difference = f"**{difference}**"
    return f"{difference}; {one.wins}/{one.pairs}"


def format_spread(spread: Spread, sign: str = "", digits: int = 3) -> str:
    """Such as "4.822 ± 0.011"; "-" where there is none."""
    if spread.mean is None:
        return "-"
    text = f"{spread.mean:{sign}.{digits}f}"
    return text if spread.error is None else f"{text} ± {spread.error:.{digits}f}"
