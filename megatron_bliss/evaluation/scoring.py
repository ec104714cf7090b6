"""Requests through a backbone: packed, in waves over the replicas, with a cache of what is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_bliss.base.progress import progress
from megatron_bliss.evaluation.backbone import Backbone
from megatron_bliss.evaluation.packing import Batch, Request, Row, make_batches, pack, waves
from megatron_bliss.evaluation.request_cache import RequestCache
from megatron_bliss.evaluation.vocabulary import predict

Answer = tuple[float, bool]
"""(sum of the targets' log-likelihoods, whether each target is the most likely token)."""


def score(
    backbone: Backbone,
    requests: Sequence[Request],
    *,
    batch_tokens: int,
    cache: RequestCache | None = None,
    show_progress: bool = False,
) -> list[Answer]:
    """Answers in the order of the requests, the same on every rank; equal requests are computed once.

    A wave of rows is the unit of work: its batches depend on all requests but not on what the cache holds, so that a
    run that was killed and started again ends with the same bits. Raises FloatingPointError where an answer isn't
    finite.
    """
    unique = list(dict.fromkeys(requests))
    answers: dict[Request, Answer] = {} if cache is None else cache.find(unique)
    rows = pack(unique, share=backbone.shares_beginnings, max_row=batch_tokens)
    # What is longest comes first: the estimate of what is left errs on the long side, and want of memory shows at once.
    plan = waves(
        rows,
        batch_tokens=batch_tokens,
        batches=backbone.batches_in_flight * backbone.replicas.size,
        multiple=backbone.width_multiple,
    )
    shown = show_progress and backbone.replicas.is_main
    done = len(answers)
    with progress(len(unique), description="evaluate", unit="requests", enabled=shown, initial=done) as bar:
        for wave in plan:
            numbers = [number for row in wave for number in row.picks]
            missing = [number for number in numbers if unique[number] not in answers]
            if not missing:
                continue
            found = _score_wave(backbone, wave, unique)
            new = {unique[number]: found[number] for number in missing}
            answers.update(new)
            if cache is not None:
                cache.add(new)
            bar.update(len(new))
    if cache is not None:
        cache.flush()
    return [answers[request] for request in requests]


def _score_wave(backbone: Backbone, wave: Sequence[Row], requests: Sequence[Request]) -> dict[int, Answer]:
    """Each replica takes every so-manieth row; then every rank knows all answers of the wave, by request number."""
    replicas = backbone.replicas
    numbers = [number for row in wave for number in row.picks]
    places = {number: place for place, number in enumerate(numbers)}
    answers = torch.zeros(len(numbers), 2, dtype=torch.float64, device=backbone.device)
    mine = wave[replicas.rank :: replicas.size]
    batches = make_batches(mine, backbone.batches_in_flight, backbone.width_multiple)
    hidden_states = backbone.hidden_states(batches)
    for batch, hidden in zip(batches, hidden_states, strict=bool(hidden_states)):
        found = score_batch(backbone, batch, hidden, requests)
        if replicas.answers:
            answers[[places[number] for number, _ in batch.requests]] = found
    replicas.sum_over_world(answers)
    if not answers.isfinite().all():
        raise FloatingPointError(
            "log-likelihoods are not finite: the model's weights or activations are NaN or infinite"
        )
    return {number: (value, greedy > 0) for number, (value, greedy) in zip(numbers, answers.tolist(), strict=True)}


def score_batch(backbone: Backbone, batch: Batch, hidden: Tensor, requests: Sequence[Request]) -> Tensor:
    """[requests of the batch, 2], fp64: log-likelihood, and 1 where greedy decoding gives the targets."""
    lengths = torch.tensor([len(picks) for _, picks in batch.requests], device=backbone.device)
    picks = torch.tensor([pick for _, picks in batch.requests for pick in picks], device=backbone.device)
    targets = torch.tensor(
        [t for number, _ in batch.requests for t in requests[number].targets], device=backbone.device
    )
    found = predict(backbone.vocabulary(), hidden, picks, targets)
    wrong = (found.best[picks] != targets).double()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=backbone.device), lengths)
    sums = torch.zeros(2, len(lengths), dtype=torch.float64, device=backbone.device)
    sums.index_add_(1, owner, torch.stack((found.log_likelihoods, wrong)))
    return torch.stack((sums[0], (sums[1] == 0).double()), dim=1)
