"""Validation sets: an indexed dataset ``V.bin``/``V.idx`` plus ``V.labels.npy``, which says what is to be predicted.

``V.labels.npy`` is uint8, one per token of ``V.bin``, 1 where the token is a prediction target; never the first token of a
unit. Label "last-word": a passage is judged by its last word alone (LAMBADA); "all": by all tokens but the first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_bliss.data.indexed import CorpusWriter, IndexedCorpus
from megatron_bliss.data.manifest import read_manifest, write_manifest
from megatron_bliss.data.tokenizers import Tokenizer
from megatron_bliss.files import atomic_file

LABELS = ("last-word", "all")


class ValidationCorpus:
    """Reader of a validation set; ``len()`` units, ``manifest``, ``labels`` uint8[tokens]."""

    def __init__(self, prefix: str | os.PathLike) -> None:
        self.prefix = str(prefix)
        self.manifest = read_manifest(prefix)
        if self.manifest["kind"] != "validation":
            raise ValueError(
                f"{prefix} is a {self.manifest['kind']}, expected a validation set: make one with tools/prepare_validation.py"
            )
        self.corpus = IndexedCorpus(prefix)
        path = f"{prefix}.labels.npy"
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path} does not exist; make the validation set again with tools/prepare_validation.py"
            )
        self.labels = np.load(path, mmap_mode="r", allow_pickle=False)
        if self.labels.dtype != np.uint8 or self.labels.shape != self.corpus.tokens.shape:
            raise ValueError(
                f"{path} holds {self.labels.dtype}{list(self.labels.shape)}, expected uint8[{len(self.corpus.tokens)}], one "
                "per token: make the validation set again"
            )

    def __reduce__(self):
        """Pickle as the path."""
        return ValidationCorpus, (self.prefix,)

    def __len__(self) -> int:
        """Number of units."""
        return len(self.corpus)

    def gather(self, ids: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Several units at once: (tokens int64[n, w], label_mask bool[n, w], lengths int64[n]), w the longest of them.

        Units longer than ``max_length`` lose their beginning, so that the label stays. Padding is 0 and unlabelled, and so
        is the first token of every row.
        """
        rows, columns, positions, lengths = self.corpus.token_positions(ids, max_length, keep="tail")
        tokens = np.zeros((len(lengths), int(lengths.max(initial=0))), dtype=np.int64)
        mask = np.zeros(tokens.shape, dtype=bool)
        tokens[rows, columns] = self.corpus.tokens[positions]
        mask[rows, columns] = self.labels[positions] == 1
        mask[:, :1] = False
        return tokens, mask, lengths
