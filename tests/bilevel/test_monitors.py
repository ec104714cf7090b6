"""Signs of failure are warned of once, with advice; what makes all later numbers meaningless is an error."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megatron_bliss.bilevel.monitors import PATIENCE, Limits, Monitors, check_replicas, validation_advice
from tests.distributed import run_distributed

LIMITS = Limits(num_samples=32, kl=0.2)
HEALTHY = {"kl": 0.05, "entropy": 3.2, "score_std": 0.2, "residual": 0.8, "validation_loss": 5.0}


@pytest.mark.parametrize(
    ("sign", "advice"),
    [
        ({"kl": 0.3}, "bilevel.kl_weight"),
        ({"entropy": math.log(32)}, "do not"),
        ({"score_std": 0.49}, "0 or 1"),
        ({"residual": 5.0}, "solver_max_step_size"),
    ],
)
def test_each_sign_is_warned_of_once_when_it_lasts(sign: dict, advice: str) -> None:
    advice = {"do not": "does not tell samples apart"}.get(advice, advice)
    monitors = Monitors(LIMITS)
    warnings = [monitors.observe(step, {**HEALTHY, **sign}) for step in range(3 * PATIENCE)]
    given = [text for texts in warnings for text in texts]
    assert len(given) == 1 and advice in given[0]
    assert warnings[PATIENCE - 1] == given
    assert monitors.warnings == given


def test_a_healthy_stage_and_single_outliers_are_left_alone() -> None:
    monitors = Monitors(LIMITS)
    for step in range(4 * PATIENCE):
        outlier = {"kl": 0.9} if step % PATIENCE == 0 else {}
        assert monitors.observe(step, {**HEALTHY, **outlier}) == []


def test_a_resumed_stage_warns_like_an_uninterrupted_one() -> None:
    first, second = Monitors(LIMITS), Monitors(LIMITS)
    for step in range(PATIENCE - 1):
        first.observe(step, {**HEALTHY, "kl": 1.0})
    second.load_state_dict(first.state_dict())
    assert len(second.observe(PATIENCE - 1, {**HEALTHY, "kl": 1.0})) == 1
    assert second.validation_loss == pytest.approx(5.0)


def test_a_number_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(FloatingPointError, match="kl nan at step 7"):
        Monitors(LIMITS).observe(7, {**HEALTHY, "kl": float("nan")})
    Monitors(LIMITS).observe(7, {**HEALTHY, "residual": float("nan")})  # the identity solver measures none


def test_a_rising_validation_loss_past_round_two_gets_advice() -> None:
    assert validation_advice([5.0, 5.1]) is None
    assert validation_advice([5.0, 4.9, 4.8]) is None
    assert "from 4.9000 to 5.2000 in round 3" in validation_advice([5.0, 4.9, 5.2])


def replicas(rank: int, world_size: int) -> list[str]:
    """Compare equal and unequal copies; the messages of what was raised."""
    messages = []
    for wrong in (False, True):
        proxy = torch.ones(5) + (1e-6 if wrong and rank == 1 else 0.0)
        try:
            check_replicas({"z": torch.zeros(3), "proxy": proxy}, dist.group.WORLD)
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def test_replicas_that_differ_are_an_error_on_every_rank() -> None:
    for messages in run_distributed(replicas, 2):
        assert len(messages) == 1 and "found proxy to differ between ranks" in messages[0]
