"""Chosen units as rows with their text: what other software reads of a selection.

A row has id, text, url, domain, format, label, file, line, unit (number in the root corpus), tokens, score and rank (1:
the best of the chosen), in corpus order. Where the rows come from (:func:`unit_rows`, :func:`scored_text_rows`) and
where they go (:func:`megatron_bliss.selection.row_files.export_rows`) know nothing of each other. Memory: 8 bytes per
chosen unit for its rank, and some ten thousand rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from megatron_bliss.data.indexed import IndexedCorpus, blocks
from megatron_bliss.data.ingest.provenance import FIELDS
from megatron_bliss.data.manifest import read_manifest
from megatron_bliss.data.provenance import provenance_path, read_provenance
from megatron_bliss.data.subset import root_prefix, root_units
from megatron_bliss.selection.row_files import check_row_file, export_rows
from megatron_bliss.selection.row_texts import decoded_texts, distinct_files, load_decoder, source_texts, why_no_source
from megatron_bliss.selection.scored_text import ScoredText

TEXTS = ("auto", "source", "tokens", "none")
Text = Literal["auto", "source", "tokens", "none"]
FACTS_BLOCK = 1 << 16
"""Rows whose provenance is read at once."""
ROWS, CHARACTERS = 4096, 8 << 20
"""Rows of a batch, and characters of text after which it ends earlier."""


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        *((name, pa.string()) for name in FIELDS),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("unit", pa.int64()),
        ("tokens", pa.int64()),
        ("score", pa.float64()),
        ("rank", pa.int64()),
    ]
)
"""Columns of a row; ``text`` is the second where there is text, and ``score`` float32 where the scores are."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: str
    rows: int
    text: str
    """Where the text is from: source, tokens or none."""
    why: str
    """The same in words, and why."""


@dataclass(frozen=True)
class TextPlan:
    """Where the text of some units will come from, decided before anything is written."""

    text: Literal["source", "tokens", "none"]
    why: str


def plan_text(
    prefix: str | os.PathLike, ids: np.ndarray, text: Text = "auto", *, tokenizer_model: str | None = None
) -> TextPlan:
    """How units of a corpus get their text; ValueError where it cannot come from where it was asked for.

    auto: the source files, where units are documents and the files that the chosen ones come from are there and have
    the size that the manifest has of them; else the tokens. It reads where the chosen units come from.
    """
    if text not in TEXTS:
        raise ValueError(f"found text {text!r}, expected one of {', '.join(TEXTS)}: change --export-text")
    if text == "none":
        return TextPlan("none", "no text")
    missing = why_no_source(prefix, ids) if text != "tokens" else ""
    if text == "source" and missing:
        raise ValueError(f"found {missing}, expected text of source files: change --export-text to tokens")
    if text == "tokens" or missing:
        load_decoder(prefix, tokenizer_model)
        reason = f" ({missing})" if missing else ""
        return TextPlan("tokens", f"text decoded from tokens, which may differ from the original{reason}")
    return TextPlan("source", "text of the source files")


def export_units(
    prefix: str | os.PathLike,
    ids: np.ndarray,
    scores: np.ndarray,
    path: str | os.PathLike,
    *,
    text: Text = "auto",
    tokenizer_model: str | None = None,
) -> Exported:
    """Write units of a corpus or subset as rows with their text.

    ids: int[k], increasing, numbers of units of ``prefix``. scores: float[n], one per unit of ``prefix``. path:
    ``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst`` or ``.parquet``. text: as :func:`plan_text`. tokenizer_model: its file, if
    it is not where the manifest says. Raises ValueError for a text that cannot be had, and a path that is a file the
    corpus needs; nothing is written then.
    """
    check_export(path, prefix)
    plan = plan_text(prefix, ids, text, tokenizer_model=tokenizer_model)
    count = export_rows(path, unit_rows(prefix, ids, scores, text=plan.text, tokenizer_model=tokenizer_model))
    return Exported(str(path), count, plan.text, plan.why)


def export_scored_text(
    folder: str | os.PathLike,
    ids: np.ndarray,
    scores: np.ndarray | None,
    json_keys: Sequence[str],
    path: str | os.PathLike,
    *,
    text: Text = "source",
) -> Exported:
    """Write documents of a :class:`ScoredText` folder as rows, as :func:`export_units` does.

    ids: int[k], increasing, numbers of documents. scores: float[n], one per document of the folder (None: its own).
    json_keys: keys or columns that hold the text. text: source (or auto), or none: there are no tokens.
    """
    found = ScoredText(folder)
    check_row_file(path)
    if text not in ("source", "auto", "none"):
        raise ValueError(f"found text {text!r} for {folder}, which has no tokens, expected source or none")
    _refuse_overwriting(path, [found.provenance_path, *distinct_files(found.provenance, ids)])
    plan = TextPlan("none", "no text") if text == "none" else TextPlan("source", "text of the source files")
    keys = None if text == "none" else json_keys
    count = export_rows(path, scored_text_rows(found, ids, found.scores if scores is None else scores, keys))
    return Exported(str(path), count, plan.text, plan.why)


def check_export(path: str | os.PathLike, prefix: str | os.PathLike) -> None:
    """ValueError for a path that rows of this corpus cannot be written to: another suffix, or a file it needs."""
    check_row_file(path)
    sources = [source["file"] for source in read_manifest(root_prefix(prefix)).get("sources", [])]
    _refuse_overwriting(path, [provenance_path(prefix), *sources])


def unit_rows(
    prefix: str | os.PathLike,
    ids: np.ndarray,
    scores: np.ndarray,
    *,
    text: Literal["source", "tokens", "none"],
    tokenizer_model: str | None = None,
) -> Iterator[pa.Table]:
    """Rows of units of a corpus, with text from there; ids and scores as for :func:`export_units`."""
    corpus, root = IndexedCorpus(prefix), root_prefix(prefix)
    ids = _checked(ids, scores, len(corpus), prefix)
    known = os.path.isfile(provenance_path(prefix))
    by_line = known and read_manifest(root)["unit"] == "document"  # several windows may begin in one line

    def facts() -> Iterator[pa.Table]:
        ranks = ranks_of(scores[ids])
        for part in blocks(len(ids), FACTS_BLOCK):
            units, places = root_units(prefix, ids[part]), None
            if known:
                places = read_provenance(prefix, ids[part])
            names = None if by_line else [f"{os.path.basename(root)}:{unit}" for unit in units.tolist()]
            yield _facts(places, units, corpus.lengths[ids[part]], (scores[ids[part]], ranks[part]), names)

    texts = None
    if text == "source":
        keys = read_manifest(root)["settings"]["json_keys"]
        texts = source_texts(lambda some, columns: read_provenance(prefix, some, columns), ids, keys)
    if text == "tokens":
        texts = decoded_texts(corpus, ids, load_decoder(prefix, tokenizer_model))
    return _with_texts(facts(), texts)


def scored_text_rows(
    found: ScoredText, ids: np.ndarray, scores: np.ndarray, json_keys: Sequence[str] | None
) -> Iterator[pa.Table]:
    """Rows of documents of scored text; json_keys None: without text."""
    ids = _checked(ids, scores, len(found), found.name)

    def facts() -> Iterator[pa.Table]:
        ranks = ranks_of(scores[ids])
        for part in blocks(len(ids), FACTS_BLOCK):
            some = ids[part]
            yield _facts(found.provenance(some), some, found.token_counts[some], (scores[some], ranks[part]), None)

    texts = None if json_keys is None else source_texts(found.provenance, ids, json_keys)
    return _with_texts(facts(), texts)


def ranks_of(scores: np.ndarray) -> np.ndarray:
    """int64[k], 1 for the best of float[k]; of equal scores the first has the better rank."""
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return ranks


def _facts(
    places: pa.Table | None,
    units: np.ndarray,
    tokens: np.ndarray,
    scored: tuple[np.ndarray, np.ndarray],
    ids: list[str] | None,
) -> pa.Table:
    """All columns but text. places: provenance rows, if there are any; scored: scores and ranks; ids None: by line."""
    columns = places.column_names if places is not None else []
    known = {name: places.column(name) for name in ("file", "line", *FIELDS) if name in columns}
    if ids is None:
        files, lines = known["file"].to_pylist(), known["line"].to_pylist()
        ids = [f"{os.path.basename(file)}:{line}" for file, line in zip(files, lines, strict=True)]
    scores, ranks = scored
    own = {"unit": units, "tokens": tokens, "score": scores, "rank": ranks, "id": ids}
    empty = pa.nulls(len(units))
    arrays = {name: known.get(name, own.get(name, empty)) for name in SCHEMA.names}
    kinds = {"score": pa.float32() if scores.dtype == np.float32 else pa.float64()}
    columns = {name: _typed(array, kinds.get(name, SCHEMA.field(name).type)) for name, array in arrays.items()}
    return pa.table(columns)


def _typed(array: object, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return array.cast(kind) if isinstance(array, pa.Array | pa.ChunkedArray) else pa.array(array).cast(kind)


def _with_texts(facts: Iterable[pa.Table], texts: Iterator[str] | None) -> Iterator[pa.Table]:
    """The rows in small tables, each with its text as the second column if there are texts."""
    for table in facts:
        start, found, size = 0, [], 0
        for place in range(len(table)) if texts is not None else ():
            found.append(next(texts))
            size += len(found[-1])
            if len(found) == ROWS or size >= CHARACTERS or place + 1 == len(table):
                yield table.slice(start, len(found)).add_column(1, "text", pa.array(found, pa.string()))
                start, found, size = place + 1, [], 0
        for part in blocks(len(table) if texts is None else 0, ROWS):
            yield table.slice(part.start, part.stop - part.start)


def _checked(ids: np.ndarray, scores: np.ndarray, count: int, name: str | os.PathLike) -> np.ndarray:
    """int64[k] that increase and are numbers of units; one score for each unit of all."""
    ids = np.asarray(ids, dtype=np.int64)
    if scores.shape != (count,):
        raise ValueError(f"found scores {list(scores.shape)} for {name}, expected one for each of its {count} units")
    if not len(ids) or ids[0] < 0 or ids[-1] >= count or (np.diff(ids) <= 0).any():
        raise ValueError(f"found {len(ids)} units of {name} to export, expected some, increasing, of 0 to {count - 1}")
    return ids


def _refuse_overwriting(path: str | os.PathLike, needed: Iterable[str]) -> None:
    """ValueError where a file to be written is one that rows come from."""
    real = os.path.realpath(path)
    if any(os.path.realpath(one) == real for one in needed):
        raise ValueError(f"found {path}, which the rows come from, expected another name: change --export")
