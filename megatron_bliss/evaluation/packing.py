"""Requests as rows of tokens: what many share is computed once, and what is computed together has like length.

A request is an input, of which the last positions predict the request's targets. Inputs that begin alike (the choices
of a question) share one row: their common beginning, then each one's rest as a branch that does not see the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

MIN_SHARED = 0.25
"""A text joins a row where it shares at least this part of itself: longer rows cost more padding and attention."""


class Request(NamedTuple):
    """``tokens`` go in; the last ``len(targets)`` of them predict ``targets``."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass
class Row:
    """Texts with a common beginning. ``picks``: request number -> the row's columns that predict its targets."""

    tokens: list[int]
    positions: list[int]
    branches: list[int]
    picks: dict[int, list[int]] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether the row is one text from left to right."""
        return not self.branches or self.branches[-1] == 0


class Batch(NamedTuple):
    """Rows as tensors, and where to look: pick i is hidden state (``rows[i]``, ``columns[i]``)."""

    tokens: Tensor
    positions: Tensor | None
    branches: Tensor | None
    rows: Tensor
    columns: Tensor
    requests: list[tuple[int, list[int]]]
    """(request number, its picks)."""


def pack(requests: Sequence[Request], *, share: bool, max_row: int) -> list[Row]:
    """Rows that hold every request once, longest first; equal inputs always meet in one row."""
    numbers: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        numbers.setdefault(request.tokens, []).append(number)
    texts = sorted(numbers)
    groups = _groups(texts, max_row) if share else ([text] for text in texts)
    rows = [_row(group, numbers, requests) for group in groups]
    return sorted(rows, key=lambda row: (-len(row.tokens), row.tokens))


def _groups(texts: Sequence[tuple[int, ...]], max_row: int) -> Iterator[list[tuple[int, ...]]]:
    """Neighbours in alphabetical order, joined where that makes fewer tokens and no row longer than ``max_row``."""
    group: list[tuple[int, ...]] = []
    shared = total = 0
    for text in texts:
        common = _common_length(group[0], text, shared) if group else 0
        alone = total - (len(group) - 1) * shared + len(text)
        joined = total + len(text) - len(group) * common
        if group and common >= MIN_SHARED * len(text) and joined < alone and joined <= max_row:
            group.append(text)
            shared, total = common, total + len(text)
            continue
        if group:
            yield group
        group, shared, total = [text], len(text), len(text)
    if group:
        yield group


def _common_length(first: Sequence[int], second: Sequence[int], limit: int) -> int:
    """Tokens with which both begin, at most ``limit``."""
    limit = min(limit, len(second))
    return next((i for i in range(limit) if first[i] != second[i]), limit)


def _row(texts: list[tuple[int, ...]], numbers: dict[tuple[int, ...], list[int]], requests: Sequence[Request]) -> Row:
    shared = _common_length(texts[0], texts[-1], len(texts[0]))  # in alphabetical order: common to all between
    row = Row(list(texts[0][:shared]), list(range(shared)), [0] * shared)
    for branch, text in enumerate(texts, start=1):
        start = len(row.tokens)
        row.tokens += text[shared:]
        row.positions += range(shared, len(text))
        row.branches += [branch if len(texts) > 1 else 0] * (len(text) - shared)
        for number in numbers[text]:
            first = len(text) - len(requests[number].targets)
            columns = range(first, len(text))
            row.picks[number] = [column if column < shared else start + column - shared for column in columns]
    return row


def waves(rows: Sequence[Row], *, batch_tokens: int, batches: int, multiple: int = 1) -> Iterator[list[Row]]:
    """Cut rows, longest first, into what ``batches`` batches of at most ``batch_tokens`` tokens hold, padding included.

    A row that is longer makes a batch of its own; rows are padded to a ``multiple`` of tokens.
    """
    start = 0
    while start < len(rows):
        count = rows_per_batch(rows[start], batch_tokens, multiple) * batches
        yield list(rows[start : start + count])
        start += count


def rows_per_batch(longest: Row, batch_tokens: int, multiple: int) -> int:
    """Rows as long as this one in a batch."""
    return max(1, batch_tokens // _padded(len(longest.tokens), multiple))


def _padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def make_batches(rows: Sequence[Row], batches: int, multiple: int) -> list[Batch]:
    """Deal rows to at most ``batches`` batches of one shape."""
    if not rows:
        return []
    height = -(-len(rows) // batches)
    width = _padded(max(len(row.tokens) for row in rows), multiple)
    plain = all(row.is_plain for row in rows)
    return [_batch(rows[start : start + height], height, width, plain) for start in range(0, len(rows), height)]


def _batch(rows: Sequence[Row], height: int, width: int, plain: bool) -> Batch:
    """Tensors [height, width], padded by zeros: on the right, where no text's token looks, and below."""
    tokens, positions, branches = (torch.zeros(height, width, dtype=torch.int64) for _ in range(3))
    pick_rows: list[int] = []
    pick_columns: list[int] = []
    requests = []
    for index, row in enumerate(rows):
        length = len(row.tokens)
        tokens[index, :length] = torch.tensor(row.tokens)
        positions[index, :length] = torch.tensor(row.positions)
        branches[index, :length] = torch.tensor(row.branches)
        columns = sorted({column for picked in row.picks.values() for column in picked})
        place = {column: len(pick_columns) + offset for offset, column in enumerate(columns)}
        requests += [(number, [place[column] for column in picked]) for number, picked in row.picks.items()]
        pick_rows += [index] * len(columns)
        pick_columns += columns
    layout = (None, None) if plain else (positions, branches)
    return Batch(tokens, *layout, torch.tensor(pick_rows), torch.tensor(pick_columns), requests)
