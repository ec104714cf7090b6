"""A study's page of Markdown as one HTML page that holds its plots and loads nothing.

It knows what pages of studies are made of: headings, paragraphs, tables, pictures, **bold** and `code`.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path

from megatron_bliss.report.page import document
from megatron_bliss.report.parts import escape

_PICTURE = re.compile(r"!\[(?P<title>[^\]]*)\]\((?P<name>[^)]+)\)")
_BOLD, _CODE = re.compile(r"\*\*(.+?)\*\*"), re.compile(r"`(.+?)`")


def format_html(markdown: str, folder: Path, name: str) -> str:
    """The page; folder: where the plots lie; name: of the study."""
    blocks = (block.strip("\n") for block in markdown.split("\n\n"))
    return document(f"{name} - BLISS study", "\n".join(_block(block, folder) for block in blocks if block))


def _block(block: str, folder: Path) -> str:
    for mark, tag in (("# ", "h1"), ("## ", "h2"), ("### ", "h3")):
        if block.startswith(mark):
            return f"<{tag}>{_inline(block.removeprefix(mark))}</{tag}>"
    if block.startswith("|"):
        return _table(block.splitlines())
    picture = _PICTURE.fullmatch(block)
    return _figure(picture["title"], folder / picture["name"]) if picture else f"<p>{_inline(block)}</p>"


def _table(lines: list[str]) -> str:
    """The first line is the head, the second says what is flush right: where nothing is, all but the first column."""
    head, rule, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines)
    right = [mark.endswith(":") for mark in rule]
    right = right if any(right) else [column > 0 for column in range(len(rule))]

    def line(cells: list[str], tag: str) -> str:
        kinds = ["number" if is_right else "label" for is_right in right]
        content = (f'<{tag} class="{kind}">{_inline(cell)}</{tag}>' for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(content)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>\n<thead>{line(head, "th")}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _figure(title: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
    return f"<figure>\n<figcaption>{_inline(title)}</figcaption>\n{image}\n</figure>"


def _inline(text: str) -> str:
    """Escaped text with its bold words, which say that something is worse, and its names in code."""
    text = _BOLD.sub(r'<b class="worse">\1</b>', escape(text))
    return _CODE.sub(r"<code>\1</code>", text)
