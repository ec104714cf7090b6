"""Log-likelihoods from hidden states, over a vocabulary that may be split across tensor-parallel ranks.

Only the hidden states that predict something come here, and a chunk of logits at a time: no [batch, tokens, vocabulary]
tensor exists, and the vocabulary is never gathered. Shapes: u hidden states, p targets, w width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bliss.base.parallel import all_gather

CHUNK = 256
"""Hidden states whose logits are made at once: 51 MB in fp32 at 50,304 tokens."""


@dataclass(frozen=True)
class VocabularyPart:
    """Rows ``first`` to ``first + len(weight)`` of the output matrix, on this rank; ``weight`` has no padding rows."""

    weight: Tensor
    first: int = 0
    group: dist.ProcessGroup | None = None
    """Ranks that hold the other parts."""


class Predictions(NamedTuple):
    """``log_likelihoods`` fp64 [p] of the targets; ``best`` int64 [u], the most likely token (the first of equals)."""

    log_likelihoods: Tensor
    best: Tensor


def predict(part: VocabularyPart, hidden_states: Tensor, places: Tensor, targets: Tensor) -> Predictions:
    """hidden_states [u, w]; targets [p] are predicted by the hidden states ``places`` [p]; softmax in fp32.

    Collective over ``part.group``, whose ranks get the same bits.
    """
    count = len(hidden_states)
    normalizers, largest, best = (hidden_states.new_zeros(count, dtype=torch.float64) for _ in range(3))
    predicted = hidden_states.new_zeros(len(targets), dtype=torch.float64)
    local = targets - part.first
    here = (local >= 0) & (local < len(part.weight))
    for start in range(0, count, CHUNK):
        rows = slice(start, start + CHUNK)
        mine = (here & (places >= start) & (places < start + CHUNK)).nonzero().squeeze(-1)
        if not len(part.weight):  # every token of this rank is padding
            normalizers[rows] = largest[rows] = -torch.inf
            continue
        logits = (hidden_states[rows] @ part.weight.t()).float()
        normalizers[rows] = logits.logsumexp(-1).double()
        values, indices = logits.max(-1)
        largest[rows], best[rows] = values.double(), (indices + part.first).double()
        predicted[mine] = logits[places[mine] - start, local[mine]].double()
    return _combine(part.group, normalizers, largest, best, predicted, places)


def _combine(group, normalizers: Tensor, largest: Tensor, best: Tensor, predicted: Tensor, places: Tensor):
    """The whole vocabulary's normalizer, maximum and target logits: one exchange of 3 u + p numbers."""
    if group is not None and group.size() > 1:
        sizes = [len(normalizers)] * 3 + [len(predicted)]
        parts = all_gather(torch.cat((normalizers, largest, best, predicted)), group)
        normalizers, largest, best, predicted = parts.split(sizes, dim=1)
        normalizers, predicted = normalizers.logsumexp(0), predicted.sum(0)
        best = torch.where(largest == largest.amax(0), best, torch.inf).amin(0)
    return Predictions(predicted - normalizers[places], best.long())
