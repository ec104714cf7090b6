"""Text that was scored without an index: a folder of ``scores.npy``, ``lengths.npy`` and ``provenance.parquet``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.provenance import column_codes, open_provenance, read_rows, require_column
from megatron_bliss.selection.policy import Domains
from megatron_bliss.selection.score_files import load_npy


class ScoredText:
    """Documents of such a folder, numbered from 0 in its order; policies can be applied to them.

    ``scores`` float[n] and ``token_counts`` int[n] are mapped. Raises ValueError for files that are missing, damaged or
    of different lengths.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.name = str(folder)
        self.provenance_path = str(Path(folder) / "provenance.parquet")
        self.scores = self._array("scores.npy", "f", "scores")
        self.token_counts = self._array("lengths.npy", "iu", "numbers of tokens")
        with open_provenance(self._file("provenance.parquet")) as file:
            rows = file.metadata.num_rows
        counts = {"scores": len(self.scores), "lengths": len(self.token_counts), "rows of provenance": rows}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise ValueError(f"found {found} in {folder}, expected one each per document: score the text again")

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.scores)

    def lengths(self) -> np.ndarray:
        """int[n] tokens."""
        return np.array(self.token_counts)

    def domains(self, field: str) -> Domains:
        """By a column of the provenance."""
        require_column(self.provenance_path, field)
        return Domains(*column_codes(self.provenance_path, field, self.name))

    def corpus(self) -> IndexedCorpus:
        """Refused: there are no tokens."""
        raise ValueError(
            f"found selection.near_duplicates for {self.name}, which is text without an index, expected an indexed "
            "corpus: run tools/preprocess_data.py first, or set near_duplicates to 0"
        )

    def provenance(self, ids: np.ndarray, columns: list[str] | None = None) -> pa.Table:
        """Where documents come from: one row for each of ``ids``, in their order."""
        return read_rows(self.provenance_path, ids, columns)

    def _file(self, name: str) -> str:
        path = Path(self.name) / name
        if not path.is_file():
            raise ValueError(f"found no {name} in {self.name}, expected a folder of scored text: give another one")
        return str(path)

    def _array(self, name: str, kinds: str, words: str) -> np.ndarray:
        path = self._file(name)
        found = load_npy(path)
        if found.ndim != 1 or found.dtype.kind not in kinds:
            raise ValueError(
                f"found {found.dtype}{list(found.shape)} in {path}, expected {words}, one per document: score the text "
                "again"
            )
        return found
