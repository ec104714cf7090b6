"""A guide of several sets, each with a weight: what the upper level is a weighted mean over.

Samples are numbered set after set. A batch has as many samples of every set, as far as its size can be divided,
whatever the weights are: a set that weighs little is measured as well as the others. Sets that the guide is held
against (data.reference_prefix) stand behind its own, and weigh 0.

Shapes: b samples, K sets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_bliss.data.batches import Batch, BatchSchedule, BatchSource, SampleOrder, rank_share


class GuideSets:
    """Several sets as one source of samples, with ``names`` and ``weights`` (float64 [K], sum 1)."""

    def __init__(self, sets: Sequence[BatchSource], names: Sequence[str], weights: Sequence[float]) -> None:
        """``weights``: numbers from 0 on of any sum above 0; none: equal ones."""
        self.sets, self.names, self.seq_length = list(sets), list(names), sets[0].seq_length
        weights = np.array(weights if len(weights) else [1.0] * len(sets), dtype=np.float64)
        self.weights = weights / weights.sum()
        self.ends = np.cumsum([len(one) for one in sets])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def set_of(self, ids: np.ndarray) -> np.ndarray:
        """int64 [b]: the number of the set of each sample."""
        return np.searchsorted(self.ends, ids, side="right")

    def batch(self, ids: np.ndarray) -> Batch:
        """The samples ``ids``, in their order, as wide as the longest of them."""
        ids = np.asarray(ids, dtype=np.int64)
        sets = self.set_of(ids)
        places, parts = [], []
        for number, source in enumerate(self.sets):
            here = np.flatnonzero(sets == number)
            if len(here):
                places.append(here)
                parts.append(source.batch(ids[here] - self.first(number)))
        width = max((part.tokens.shape[1] for part in parts), default=0)
        tokens = torch.zeros(len(ids), width, dtype=torch.int64)
        mask, lengths = torch.zeros(len(ids), width, dtype=torch.bool), torch.zeros(len(ids), dtype=torch.int64)
        for here, part in zip(places, parts, strict=True):
            rows = torch.from_numpy(here)
            tokens[rows, : part.tokens.shape[1]] = part.tokens
            mask[rows, : part.tokens.shape[1]] = part.label_mask
            lengths[rows] = part.lengths
        return Batch(tokens, mask, lengths, torch.from_numpy(ids))

    def draw(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """int64 [count]: samples in random order, sets in the shares of their weights; a used-up set begins anew."""
        ids, due = [], []
        for number, (source, weight) in enumerate(zip(self.sets, self.weights, strict=True)):
            if not weight:
                continue
            order = generator.permutation(len(source))
            many = int(np.ceil(count * weight)) + 1
            ids.append(self.first(number) + order[np.arange(many) % len(order)])
            due.append((np.arange(many) + 0.5) / weight)
        first = np.argsort(np.concatenate(due), kind="stable")[:count]
        return np.concatenate(ids)[first]

    def first(self, number: int) -> int:
        """The first sample of a set."""
        return int(self.ends[number]) - len(self.sets[number])


def draw_samples(source: BatchSource, count: int, generator: np.random.Generator) -> np.ndarray:
    """int64: ``count`` samples of a guide in random order, or all of them where there are fewer."""
    if isinstance(source, GuideSets):
        return source.draw(min(count, len(source)), generator)
    return generator.permutation(len(source))[:count]


class GuideSchedule(BatchSchedule):
    """Batches of a guide of several sets: the first samples are of the first set, and so on.

    Raises ValueError for a batch that has not a sample of every set.
    """

    def __init__(self, source: GuideSets, global_batch_size: int, *, seed: int, rank: int, world_size: int) -> None:
        super().__init__(source, global_batch_size, seed=seed, rank=rank, world_size=world_size)
        many = len(source.sets)
        if global_batch_size < many:
            raise ValueError(
                f"found bilevel.validation_batch_size {global_batch_size} with {many} sets in data.validation_prefix "
                "and data.reference_prefix, expected at least a sample of each"
            )
        self._bounds = [rank_share(global_batch_size, number, many) for number in range(many)]
        self._orders = [SampleOrder(len(one), seed + number) for number, one in enumerate(source.sets)]

    def at(self, step: int) -> Batch:
        """This rank's samples of global step ``step`` (counted from 0)."""
        ids = []
        for number, (first, last) in enumerate(self._bounds):
            start, stop = max(first, self.start) - first, min(last, self.stop) - first
            if stop > start:
                done = step * (last - first)
                ids.append(self._orders[number].ids(done + start, done + stop) + self.source.first(number))
        return self.source.batch(np.concatenate(ids or [np.zeros(0, np.int64)]))
