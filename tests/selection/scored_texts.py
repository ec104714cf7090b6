"""Folders of scored text, made by hand, and the sources they speak of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.ingest.source_files import COMPRESS


def source(path: Path, texts: list[str], seed: int) -> tuple[str, dict[int, str]]:
    """A file of these texts with lines between them that cannot be used; its path, and {line: text}."""
    generator = np.random.default_rng(seed)
    records: list[str | None] = []
    for text in texts:
        records += [None] * int(generator.integers(0, 3)) + [text]
    found = {line: text for line, text in enumerate(records, 1) if text is not None}
    if path.suffix == ".parquet":
        titles = [None if text is None else f"title of {text}" for text in records]
        pq.write_table(pa.table({"text": records, "title": titles, "url": records}), path, row_group_size=5)
        return str(path), found
    if ".txt" in path.suffixes:
        bad = [b"", b"\xff", b"  "]
        lines = [bad[place % 3] if text is None else text.encode() for place, text in enumerate(records)]
    else:
        bad = [b"", b"{broken", b'{"text": ""}', b"\xff", b'{"title": "no text"}', b"7"]
        rows = [{"text": text, "title": f"title of {text}", "url": text} for text in records]
        lines = [bad[i % 6] if row["text"] is None else json.dumps(row).encode() for i, row in enumerate(rows)]
    end = path.suffix if path.suffix in COMPRESS else ""
    path.write_bytes(COMPRESS[end](b"".join(line + b"\n" for line in lines)))
    return str(path), found


def write_scored_text(folder: Path, files: list[tuple[str, dict[int, str]]], scores: np.ndarray) -> None:
    """A folder of scored text, by hand."""
    folder.mkdir()
    places = [(file, line) for file, lines in files for line in lines]
    texts = [text for _, lines in files for text in lines.values()]
    empty = pa.nulls(len(places), pa.string())
    columns = {"file": [file for file, _ in places], "line": [line for _, line in places]}
    domains = [["river", "letter", None][place % 3] for place in range(len(places))]
    columns |= {"url": texts, "domain": domains, "format": empty, "label": empty}
    pq.write_table(pa.table(columns), folder / "provenance.parquet", row_group_size=7)
    np.save(folder / "scores.npy", scores)
    np.save(folder / "lengths.npy", np.array([len(text.split()) for text in texts], dtype=np.int64))
