"""Which iterations may change the weights: what is not finite, spikes, too many skips; a record that goes on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_bliss.config.training import PretrainingConfig
from megatron_bliss.target.health import TrainingHealth

SPIKES = PretrainingConfig(loss_spike_factor=1.5, loss_spike_window=3, on_loss_spike="skip", on_nonfinite="skip")


def verdicts(health: TrainingHealth, losses: list[float], grad_norm: float = 1.0) -> list[str]:
    found = []
    for loss in losses:
        accepted = health.accepts(loss, grad_norm)
        assert accepted == (health.verdict in ("update", "warn"))
        found.append(health.verdict)
    return found


def test_by_default_what_is_not_finite_stops_and_nothing_is_a_spike():
    health = TrainingHealth(PretrainingConfig())
    assert verdicts(health, [1.0] * 200 + [100.0]) == ["update"] * 201
    assert verdicts(health, [math.nan]) == ["stop"] and "found loss nan" in health.reason
    assert verdicts(health, [math.inf]) == ["stop"]
    assert verdicts(health, [1.0], grad_norm=math.nan) == ["stop"] and "gradient norm nan" in health.reason


def test_a_spike_is_measured_by_the_median_of_recent_updates():
    health = TrainingHealth(SPIKES)
    assert verdicts(health, [9.0, 1.0]) == ["update", "update"]  # no spike before the window is full
    assert verdicts(health, [1.0, 1.6, 1.4]) == ["update", "skip", "update"]  # median of 9, 1, 1
    assert "found loss 1.6000, expected at most 1.5 x 1.0000" in reason_for(health, [1.6])
    assert list(health.recent) == [1.0, 1.0, 1.4] and health.skipped == 2  # spikes do not raise the measure


def reason_for(health: TrainingHealth, losses: list[float]) -> str:
    verdicts(health, losses)
    return health.reason


@pytest.mark.parametrize("action", ["warn", "skip", "stop"])
def test_a_spike_is_answered_as_the_option_says(action):
    health = TrainingHealth(replace(SPIKES, on_loss_spike=action))
    assert verdicts(health, [1.0, 1.0, 1.0, 2.0]) == ["update"] * 3 + [action]
    assert health.skipped == (action == "skip")
    assert (2.0 in health.recent) == (action == "warn")


def test_too_many_skips_in_a_row_stop():
    health = TrainingHealth(replace(SPIKES, max_consecutive_skips=2))
    assert verdicts(health, [math.nan, math.nan, 1.0, math.nan, math.nan, math.nan]) == [
        "skip", "skip", "update", "skip", "skip", "stop",
    ]  # fmt: skip
    assert "3 iterations in a row" in health.reason


def test_a_loaded_record_goes_on_as_the_first_would():
    losses = [1.0, 1.3, 0.7, 2.0, math.nan, 1.1, 0.9, 1.7]
    whole = TrainingHealth(SPIKES)
    expected = verdicts(whole, losses)
    first, second = TrainingHealth(SPIKES), TrainingHealth(SPIKES)
    found = verdicts(first, losses[:5])
    second.load(first.state())
    assert found + verdicts(second, losses[5:]) == expected and "skip" in expected[5:]
    assert second.state() == whole.state()
