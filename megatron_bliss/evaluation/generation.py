"""Greedy continuation of texts, batched over texts and replicas.

Every new token takes a whole forward pass over each text so far: there is no key-value cache. The tasks of the paper
need log-likelihoods only; generation is for the occasional task that asks for some words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_bliss.data.tokenizers import Tokenizer
from megatron_bliss.evaluation.backbone import Backbone
from megatron_bliss.evaluation.packing import Row, make_batches, waves
from megatron_bliss.evaluation.vocabulary import predict

Job = tuple[list[int], list[str], int]
"""(tokens of the context, stop strings, most tokens to add)."""


def generate(backbone: Backbone, tokenizer: Tokenizer, jobs: Sequence[Job], *, batch_tokens: int) -> list[str]:
    """The text that follows each context, at least up to the first stop string; the same on every rank."""
    replicas = backbone.replicas
    mine = range(replicas.rank, len(jobs), replicas.size)
    texts = _generate(backbone, tokenizer, [jobs[number] for number in mine], batch_tokens)
    by_replica = replicas.gather_texts(texts)
    return [by_replica[number % replicas.size][number // replicas.size] for number in range(len(jobs))]


def _generate(backbone: Backbone, tokenizer: Tokenizer, jobs: Sequence[Job], batch_tokens: int) -> list[str]:
    contexts = [list(context) for context, _, _ in jobs]
    added: list[list[int]] = [[] for _ in jobs]
    texts = [""] * len(jobs)
    open_jobs = [number for number, (_, _, room) in enumerate(jobs) if room > 0]
    while open_jobs:
        tokens = _next_tokens(backbone, [contexts[n] + added[n] for n in open_jobs], batch_tokens)
        for number, token in zip(open_jobs, tokens, strict=True):
            added[number].append(token)
            texts[number] = tokenizer.decode(added[number])
        open_jobs = [n for n in open_jobs if not _is_finished(jobs[n], added[n], texts[n], tokenizer.eod)]
    return texts


def _is_finished(job: Job, added: list[int], text: str, eod: int) -> bool:
    _, stops, room = job
    return len(added) >= room or added[-1] == eod or any(stop and stop in text for stop in stops)


def _next_tokens(backbone: Backbone, texts: Sequence[list[int]], batch_tokens: int) -> list[int]:
    """The most likely next token of each text; collective over a replica."""
    best = torch.zeros(len(texts), dtype=torch.int64, device=backbone.device)
    rows = [
        Row(text, list(range(len(text))), [0] * len(text), {number: [len(text) - 1]})
        for number, text in enumerate(texts)
    ]
    rows.sort(key=lambda row: -len(row.tokens))
    multiple, batches = backbone.width_multiple, backbone.batches_in_flight
    for wave in waves(rows, batch_tokens=batch_tokens, batches=batches, multiple=multiple):
        parts = make_batches(wave, batches, multiple)
        hidden_states = backbone.hidden_states(parts)
        for batch, hidden in zip(parts, hidden_states, strict=bool(hidden_states)):
            nothing = torch.zeros(0, dtype=torch.int64, device=backbone.device)
            found = predict(backbone.vocabulary(), hidden, nothing, nothing).best
            if backbone.replicas.answers:
                best[[number for number, _ in batch.requests]] = found[[picks[0] for _, picks in batch.requests]]
    return backbone.replicas.sum_over_replica(best).tolist()
