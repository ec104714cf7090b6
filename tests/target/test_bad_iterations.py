"""Poisoned batches: skipped or stopped at on every rank alike, with weights and optimizer untouched, resumable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_bliss.base import checkpoint
from megatron_bliss.config.output import CheckpointConfig
from megatron_bliss.target.sequences import MicroBatch, TrainingSequences
from tests.distributed import run_distributed
from tests.targets import (
    PRETRAINING,
    VOCAB_SIZE,
    grouped,
    layout,
    logged,
    make_corpus,
    segment_of,
    setup_of,
    train,
    written,
)


def not_finite(batch: MicroBatch) -> MicroBatch:
    return replace(batch, loss_mask=batch.loss_mask * torch.nan)


def surprising(batch: MicroBatch) -> MicroBatch:
    return replace(batch, labels=(batch.labels + VOCAB_SIZE // 2) % VOCAB_SIZE)


class Poisoned(TrainingSequences):
    """Training sequences of which some iterations (from 1) are spoilt, by NaN on the last rank only."""

    spoilt: dict[int, object] = {}

    def micro_batches(self, first: int, count: int, micro_batch_size: int) -> Iterator[MicroBatch]:
        per_iteration = count // (micro_batch_size * self.groups.data_parallel_size)
        number = first // count * per_iteration
        for batch in super().micro_batches(first, count, micro_batch_size):
            spoil = self.spoilt.get(number // per_iteration + 1)
            last = self.groups.rank == self.groups.world_size - 1
            yield spoil(batch) if spoil and (last or spoil is surprising) else batch
            number += 1


def state(folder: Path, step: int) -> tuple[str, ...]:
    """Digests of weights and optimizer state after ``step``; learning rate and losses are kept elsewhere."""
    return written(folder / "segment" / f"step_{step:08d}")


def run(groups, prefix, folder, spoilt, monkeypatch, **settings):
    monkeypatch.setattr(Poisoned, "spoilt", spoilt)
    monkeypatch.setattr("megatron_bliss.target.segment.TrainingSequences", Poisoned)
    config = replace(PRETRAINING, on_nonfinite="skip", max_consecutive_skips=2, **settings)
    saving = CheckpointConfig(save_interval=1, keep=100)
    return train(setup_of(groups), segment_of(prefix, 12), folder, config=config, saving=saving)


def bad_iterations(rank: int, world_size: int, prefix: str, folder: str) -> dict:
    folder, found = Path(folder), {}
    with grouped(layout()) as groups, pytest.MonkeyPatch.context() as monkeypatch:
        go = partial(run, groups, prefix, monkeypatch=monkeypatch)
        spikes = {"loss_spike_factor": 1.03, "loss_spike_window": 4, "on_loss_spike": "skip"}
        result, _ = go(folder / "skip", {4: not_finite, 5: not_finite, 9: surprising}, **spikes)
        found["skipped"] = result.skipped
        found["untouched"] = [
            state(folder / "skip", step) == state(folder / "skip", step - 1) for step in (3, 4, 5, 6, 9, 10)
        ]
        found["lines"] = logged(folder / "skip", groups)
        with pytest.raises(RuntimeError) as error:  # goes on at 8, and dies of three bad iterations in a row at 11
            go(folder / "stop", {4: not_finite, 9: not_finite, 10: surprising, 11: not_finite}, **spikes)
        found["stop"] = str(error.value), checkpoint.latest(folder / "stop" / "segment").name
        resumed, _ = go(folder / "stop", {9: not_finite, 10: surprising}, **spikes)
        whole, _ = go(folder / "whole", {4: not_finite, 9: not_finite, 10: surprising}, **spikes)
        found["resumed"] = state(folder / "stop", 12) == state(folder / "whole", 12)
        found["resumed skips"] = resumed.skipped, whole.skipped
        with pytest.raises(RuntimeError) as error:
            go(folder / "spike", {9: surprising}, **{**spikes, "on_loss_spike": "stop"})
        found["spike"] = str(error.value)
    return found


def test_poisoned_batches_change_nothing_on_any_rank(tmp_path):
    prefix = make_corpus(tmp_path / "corpus")
    outcomes = run_distributed(bad_iterations, 2, prefix, str(tmp_path))
    for found in outcomes:
        assert found["skipped"] == 3
        assert found["untouched"] == [False, True, True, False, True, False]
        assert "3 iterations in a row at iteration 11" in found["stop"][0]
        assert found["stop"][1] == "step_00000010"
        assert found["resumed"] and found["resumed skips"] == (3, 3)
        assert "expected at most 1.03 x" in found["spike"] and "at iteration 9" in found["spike"]
    lines = outcomes[0]["lines"]
    assert [entry["skipped_iterations"] for entry in lines if "loss" in entry] == [0] * 3 + [1] + [2] * 4 + [3] * 4
    left_out = [entry for entry in lines if "left_out" in entry]
    assert [(entry["step"], entry["left_out"]) for entry in left_out] == [(4, 1.0), (5, 1.0), (9, 1.0)]
