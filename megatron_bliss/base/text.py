"""Numbers and tables as text for people."""

from __future__ import annotations

from collections.abc import Sequence


def format_seconds(seconds: float) -> str:
    """Return ``0:44``, ``12:05``, ``3:02:44`` or, beyond a day, ``2d 03:10:00``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}:{second:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def format_bytes(count: float | None) -> str:
    """Return a size as "812 MiB" or "1.4 GiB"; "-" where it is not known."""
    if count is None:
        return "-"
    for unit, size in (("TiB", 2**40), ("GiB", 2**30)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**20:.0f} MiB"


def format_flops(count: float | None) -> str:
    """Return a number of operations as "1.2 TFLOP"; "-" where it is not known."""
    if not count:
        return "-"
    for unit, size in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if count >= size:
            return f"{count / size:.1f} {unit}FLOP"
    return f"{count / 1e6:.1f} MFLOP"


def format_loss(loss: float | None) -> str:
    """Return a loss with four decimals; "-" where it is not known."""
    return "-" if loss is None else f"{loss:.4f}"


def align(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a titled table as aligned text; the first ``left`` columns are flush left, the others flush right."""
    cells = [[_clip(str(cell)) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join(
        [title, *(f"  {line}" for line in [lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])]
    )


def _clip(text: str, width: int = 36) -> str:
    """Cut a cell to a width and drop what could move a terminal's cursor."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= width else text[: width - 3] + "..."
