"""Parts of a page: sections, figures and tables of escaped text."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from megatron_bliss.report.plots import color_variable


class Marked(NamedTuple):
    """Text of a table's cell that a class of the page's style sets off."""

    text: str
    kind: str


def escape(text: object) -> str:
    """Return text that is safe between tags and inside quoted attributes.

    Characters that control a terminal or turn the direction of writing around become spaces.
    """
    return html.escape("".join(" " if _is_control(ord(character)) else character for character in str(text)))


def _is_control(code: int) -> bool:
    is_c0_or_c1 = code < 32 and code not in (9, 10) or 127 <= code < 160
    return is_c0_or_c1 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069


def section(title: str, note: str, *parts: str) -> str:
    """A titled section with a note (markup) and its parts; "" where all of them are empty."""
    if not any(parts):
        return ""
    intro = f'<p class="note">{note}</p>' if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{intro}\n" + "\n".join(parts) + "\n</section>"


def figure(title: str, caption: str, svg: str, keys: Mapping[str, int] | None = None) -> str:
    """A titled plot with a caption (markup) and its key, {label: series colour}."""
    legend = "".join(
        f'<span class="key"><i style="background:{color_variable(color)}"></i>{escape(label)}</span>'
        for label, color in (keys or {}).items()
    )
    legend = f'<div class="keys">{legend}</div>' if legend else ""
    return f"<figure>\n<h3>{escape(title)}</h3>\n<figcaption>{caption}{legend}</figcaption>\n{svg}\n</figure>"


def pairs(figures: Iterable[str]) -> str:
    """Figures two beside each other, empty ones left out; "" where all of them are empty."""
    shown = [figure for figure in figures if figure]
    return f'<div class="pair">{"".join(shown)}</div>' if shown else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str | Marked]], left: int = 1, total: bool = False) -> str:
    """A table of escaped text: ``left`` columns flush left, then numbers; ``total`` sets off the last row."""
    rows = list(rows)

    def line(cells: Sequence[str | Marked], tag: str, kind: str = "") -> str:
        content = ""
        for column, cell in enumerate(cells):
            text, mark = cell if isinstance(cell, Marked) else (cell, "")
            style = f"{'label' if column < left else 'number'} {mark}".strip()
            content += f'<{tag} class="{style}">{escape(text)}</{tag}>'
        return f"<tr{kind}>{content}</tr>"

    body = [line(row, "td", ' class="total"' if total and row is rows[-1] else "") for row in rows]
    return (
        f'<div class="scroll"><table>\n<thead>{line(header, "th")}</thead>\n<tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )
