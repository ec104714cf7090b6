"""Batches of units: a function of (seed, step), not of the number of ranks.

Sample ``k`` of a run is unit ``permutation(k)`` of a seeded permutation that is renewed every epoch, so any step can be
made again after a restart without replaying the ones before, and every number of ranks sees the same global batch.

Shapes: b samples, s tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.validation import ValidationCorpus


@dataclass(frozen=True)
class Batch:
    """Samples of one step, right padded with 0.

    tokens: int64 [b, s]. label_mask: bool [b, s], True where the token is a prediction target (never at position 0;
    logits at t predict token t + 1). lengths: int64 [b], real tokens per row. unit_ids: int64 [b], rows of the index.
    """

    tokens: torch.Tensor
    label_mask: torch.Tensor
    lengths: torch.Tensor
    unit_ids: torch.Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self._fields()))

    def slice(self, start: int, stop: int) -> Batch:
        """Samples ``start`` to ``stop``."""
        return Batch(*(tensor[start:stop] for tensor in self._fields()))

    def micro_batches(self, size: int) -> Iterator[tuple[slice, Batch]]:
        """(rows, samples) of at most ``size`` samples at a time, 0: all at once; ``rows`` cuts other tensors [b] alike.

        An empty batch has none.
        """
        size = size or max(len(self), 1)
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            yield rows, self.slice(rows.start, rows.stop)

    def _fields(self) -> tuple[torch.Tensor, ...]:
        return self.tokens, self.label_mask, self.lengths, self.unit_ids


class BatchSource(Protocol):
    """Something with numbered samples of at most ``seq_length`` tokens that can be fetched by number."""

    seq_length: int

    def __len__(self) -> int: ...

    def batch(self, ids: np.ndarray) -> Batch: ...


def language_model_mask(lengths: torch.Tensor, seq_length: int) -> torch.Tensor:
    """bool [b, s]: every real token but the first of its row is a prediction target."""
    positions = torch.arange(seq_length, device=lengths.device)
    return (positions[None, :] < lengths[:, None]) & (positions[None, :] > 0)


def _check_ids(tokens: np.ndarray, vocab_size: int | None, prefix: str) -> None:
    """ValueError for ids that no embedding has: a GPU would stop at an assertion that names nothing."""
    if vocab_size is not None and tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(
            f"found token ids {tokens.min()} to {tokens.max()} in {prefix}, expected 0 to {vocab_size - 1}: the corpus "
            "was made with another tokenizer than its manifest says, or its .bin is damaged"
        )


class UnitDataset:
    """Units of a corpus as language-model samples, cut to ``seq_length`` tokens; ids are checked by ``vocab_size``."""

    def __init__(self, prefix: str, seq_length: int, vocab_size: int | None = None) -> None:
        self.corpus = IndexedCorpus(prefix)
        self.seq_length, self.vocab_size = seq_length, vocab_size

    def __len__(self) -> int:
        return len(self.corpus)

    def batch(self, ids: np.ndarray) -> Batch:
        """The units ``ids`` as a :class:`Batch`, as wide as the longest of them."""
        found, counts = self.corpus.gather(ids, self.seq_length)
        _check_ids(found, self.vocab_size, self.corpus.prefix)
        tokens, lengths = torch.from_numpy(found), torch.from_numpy(counts)
        return Batch(tokens, language_model_mask(lengths, tokens.shape[1]), lengths, torch.from_numpy(np.array(ids)))


class ValidationSet:
    """Samples of a validation set, whose labels may be a few tokens only (LAMBADA: the last word)."""

    def __init__(self, prefix: str, seq_length: int, vocab_size: int | None = None) -> None:
        self.corpus = ValidationCorpus(prefix)
        self.seq_length, self.vocab_size, self.prefix = seq_length, vocab_size, prefix

    def __len__(self) -> int:
        return len(self.corpus)

    def batch(self, ids: np.ndarray) -> Batch:
        """The samples ``ids`` as a :class:`Batch`."""
        found = self.corpus.gather(ids, self.seq_length)
        _check_ids(found[0], self.vocab_size, self.prefix)
        tokens, mask, lengths = (torch.from_numpy(array) for array in found)
        return Batch(tokens, mask, lengths, torch.from_numpy(np.array(ids)))


def open_labelled(prefix: str, seq_length: int, vocab_size: int | None = None) -> BatchSource:
    """A set to measure on: with its label mask where it has one, else every token of a plain corpus is labelled."""
    kind = ValidationSet if os.path.isfile(f"{prefix}.labels.npy") else UnitDataset
    return kind(prefix, seq_length, vocab_size)


class ChosenUnits:
    """Some samples of a source as a source of their own; a batch's ``unit_ids`` are places among them.

    ``units``: int64 [n], their numbers in ``source``.
    """

    def __init__(self, source: BatchSource, units: np.ndarray) -> None:
        self.source, self.units, self.seq_length = source, units, source.seq_length

    def __len__(self) -> int:
        return len(self.units)

    def batch(self, ids: np.ndarray) -> Batch:
        """The samples at the places ``ids``."""
        found = self.source.batch(self.units[ids])
        return Batch(found.tokens, found.label_mask, found.lengths, torch.from_numpy(np.array(ids)))


class SampleOrder:
    """Which sample stands at position k of an endless, seeded, epoch-wise shuffled sequence of 0 … size − 1."""

    def __init__(self, size: int, seed: int) -> None:
        if size <= 0:
            raise ValueError("found an empty set of samples, expected at least one unit: check the corpus")
        self.size, self.seed = size, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Sample ids at positions ``start`` to ``stop`` (int64)."""
        positions = np.arange(start, stop, dtype=np.int64)
        epochs = positions // self.size
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._epoch_permutation(int(epoch))[positions[here] % self.size]
        return ids

    def _epoch_permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._epoch, self._permutation = epoch, generator.permutation(self.size)
        return self._permutation


def rank_share(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """Bounds of the contiguous share of ``count`` items that ``rank`` owns; shares differ by at most one item."""
    return count * rank // world_size, count * (rank + 1) // world_size


class BatchSchedule:
    """The batches of one rank: ``at(step)`` is its share of the global batch of that step.

    Where there are more ranks than samples, some have none: their batches are [0, 0].
    """

    def __init__(self, source: BatchSource, global_batch_size: int, *, seed: int, rank: int, world_size: int) -> None:
        if global_batch_size < 1:
            raise ValueError(f"found a global batch of {global_batch_size} samples, expected at least one")
        self.source, self.global_batch_size = source, global_batch_size
        self.order = SampleOrder(len(source), seed)
        self.start, self.stop = rank_share(global_batch_size, rank, world_size)

    def at(self, step: int) -> Batch:
        """This rank's samples of global step ``step`` (counted from 0)."""
        first = step * self.global_batch_size
        return self.source.batch(self.order.ids(first + self.start, first + self.stop))
