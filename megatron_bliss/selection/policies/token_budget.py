"""The best units that fit into a number of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_bliss.config.bounds import bounded
from megatron_bliss.data.indexed import blocks
from megatron_bliss.selection.best import finite_scores
from megatron_bliss.selection.policy import Policy


@dataclass(frozen=True)
class TokenBudgetSettings:
    """How much is kept."""

    tokens: int = bounded(0, minimum=0)
    """Most tokens kept (0, in a run: as many as the target trains on in one round)."""


def keep(scores: np.ndarray, settings: TokenBudgetSettings, *, seed: int, lengths: np.ndarray) -> np.ndarray:
    """The best units that together hold at most ``tokens`` tokens: by score, up to the first that does not fit.

    lengths: int[n], tokens per unit. Raises ValueError when not even the best unit fits.
    """
    scores, tokens = finite_scores(scores), settings.tokens
    if tokens < 1:
        raise ValueError(f"token budget is {tokens}, expected at least 1: change selection.tokens")
    bins = _coarse_rank(scores)
    sizes = sum(
        (np.bincount(bins[part], weights=lengths[part], minlength=1 << 16) for part in blocks(len(bins))),
        np.zeros(1 << 16),
    )
    from_above = np.cumsum(sizes[::-1])[::-1]  # tokens of a bin and of all better ones
    if from_above[0] <= tokens:
        return np.arange(len(scores))
    last = int(np.flatnonzero(from_above > tokens)[-1])  # the bin in which the budget ends
    room = tokens - int(from_above[last] - sizes[last])
    kept, edge = bins > last, np.flatnonzero(bins == last)
    order = edge[np.lexsort((np.random.default_rng(seed).random(len(edge)), -scores[edge].astype(np.float64)))]
    kept[order[np.cumsum(lengths[order], dtype=np.int64) <= room]] = True
    ids = np.flatnonzero(kept)
    if not len(ids):
        raise ValueError(f"token budget is {tokens}, but the best unit has {lengths[order[0]]}: raise selection.tokens")
    return ids


def _coarse_rank(scores: np.ndarray) -> np.ndarray:
    """uint16[n] that never decreases with the score: the first 16 bits of the float, made to sort as an integer."""
    scores = scores if scores.dtype in (np.float32, np.float64) else scores.astype(np.float64)
    bits = scores.dtype.itemsize * 8
    unsigned, ranks = np.dtype(f"u{scores.dtype.itemsize}"), np.empty(len(scores), dtype=np.uint16)
    for part in blocks(len(scores)):
        raw = (scores[part] + 0).view(unsigned)  # + 0: minus zero becomes zero, to which it is equal
        top = (raw >> unsigned.type(bits - 16)).astype(np.uint16)
        ranks[part] = np.where(top >> 15, ~top, top | np.uint16(1 << 15))
    return ranks


POLICY = Policy(
    help="the best that fit",
    settings=TokenBudgetSettings,
    keep=keep,
    label=lambda settings: f"tokens{settings.tokens}",
    to_keep_more="raise selection.tokens",
    needs=("lengths",),
    required=("tokens",),
    in_a_run=lambda settings, round_tokens: replace(settings, tokens=settings.tokens or round_tokens),
    share=lambda settings, tokens: min(1.0, settings.tokens / max(1, tokens)),
)
