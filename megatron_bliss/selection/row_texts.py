"""Texts of exported rows: out of the files that a corpus was made from, or decoded from its tokens."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from megatron_bliss.data.indexed import IndexedCorpus, blocks
from megatron_bliss.data.ingest.line_texts import line_texts
from megatron_bliss.data.manifest import read_manifest
from megatron_bliss.data.provenance import provenance_path, read_provenance
from megatron_bliss.data.subset import root_prefix
from megatron_bliss.data.tokenizers import Tokenizer, load_recorded_tokenizer

PLACES_BLOCK = 1 << 16
"""Rows whose file and line are read at once."""
ReadRows = Callable[[np.ndarray, list[str]], pa.Table]
"""Provenance of units: (numbers int64[k], columns) to one row each."""


class Decoder(NamedTuple):
    """What turns tokens of a corpus into text."""

    tokenizer: Tokenizer
    eod: int


def source_texts(read: ReadRows, ids: np.ndarray, keys: Sequence[str]) -> Iterator[str]:
    """The original text of each of ``ids``: a source file is read once, as long as its lines increase.

    Raises what :func:`line_texts` does.
    """
    for (_, file), places in itertools.groupby(_runs(read, ids), key=lambda place: place[:2]):
        yield from line_texts(file, keys, (line for _, _, line in places))


def _runs(read: ReadRows, ids: np.ndarray) -> Iterator[tuple[int, str, int]]:
    """(number of the run, file, line): a run is of one file, and its lines increase."""
    run, last_file, last_line = 0, None, 0
    for part in blocks(len(ids), PLACES_BLOCK):
        rows = read(ids[part], ["file", "line"])
        for file, line in zip(rows.column("file").to_pylist(), rows.column("line").to_pylist(), strict=True):
            run += file != last_file or line <= last_line
            yield run, file, line
            last_file, last_line = file, line


def distinct_files(read: ReadRows, ids: np.ndarray) -> list[str]:
    """Source files that units come from, in the order of their first ones."""
    found: dict[str, None] = {}
    for part in blocks(len(ids), PLACES_BLOCK):
        found |= dict.fromkeys(read(ids[part], ["file"]).column("file").unique().to_pylist())
    return list(found)


def why_no_source(prefix: str | os.PathLike, ids: np.ndarray) -> str:
    """Why units of a corpus cannot have the original text; "" where they can."""
    root = root_prefix(prefix)
    manifest = read_manifest(root)
    if manifest["unit"] != "document":
        return "units that are windows of several documents"
    if not os.path.isfile(provenance_path(prefix)):
        return f"no {provenance_path(prefix)}"
    if not manifest.get("settings", {}).get("json_keys"):
        return f"a manifest of {root} that does not say which keys hold the text"
    sizes = {source["file"]: source["bytes"] for source in manifest.get("sources", [])}
    for file in distinct_files(lambda some, columns: read_provenance(prefix, some, columns), ids):
        if file not in sizes:
            return f"no source {file} in the manifest of {root}"
        if not os.path.isfile(file):
            return f"no file {file}"
        if os.path.getsize(file) != sizes[file]:
            return f"{file} with {os.path.getsize(file)} bytes, {sizes[file]} when it was read"
    return ""


def load_decoder(prefix: str | os.PathLike, tokenizer_model: str | None) -> Decoder:
    """The tokenizer that a corpus was made with, from a file given or from where it was; ValueError without one."""
    identity = read_manifest(prefix).get("tokenizer")
    if not identity:
        raise ValueError(
            f"found no tokenizer in the manifest of {prefix}, expected one to decode its tokens: describe the corpus "
            "again by tools/inspect_index.py adopt, or change --export-text to none"
        )
    try:
        return Decoder(load_recorded_tokenizer(identity, tokenizer_model), identity["eod"])
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; or leave the text out: --export-text none") from error


def decoded_texts(corpus: IndexedCorpus, ids: np.ndarray, decoder: Decoder) -> Iterator[str]:
    """Tokens of each of ``ids`` as text, without an end-of-document token at its end."""
    for unit in ids.tolist():
        tokens = corpus[unit]
        yield decoder.tokenizer.decode(tokens[:-1] if len(tokens) and tokens[-1] == decoder.eod else tokens)
