"""Multipliers find the constrained optimum of brute force, and a trainer's are those of a naive account in fp64."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from megatron_bliss.bilevel.flops import GRADIENT_PASSES, bilevel_flops
from megatron_bliss.bilevel.minimax import (
    U_MAX,
    U_MIN,
    U_START,
    MinimaxLevel,
    minimax_weights,
    moved_multipliers,
)
from megatron_bliss.models.presets import flops_per_token
from tests.bilevel import reference
from tests.bilevel.guided import SETS, SHARES, GuidedTrainer, MinimaxTrainer
from tests.bilevel.minimax_problem import Ridge
from tests.bilevel.trainers import ALONE, CONFIG, OPTIMIZER, make_trainer

RATE, SLACK = 2.0, 0.01
MINIMAX = dataclasses.replace(CONFIG, guide_weighting="minimax", minimax_rate=RATE, minimax_slack=SLACK)
EQUAL = np.full(3, 1 / 3)


def grid(count: int) -> np.ndarray:
    """All weights of three groups in steps of 1 / count: [points, 3]."""
    first, second = np.meshgrid(np.arange(count + 1), np.arange(count + 1), indexing="ij")
    points = np.stack([first, second, count - first - second], -1).reshape(-1, 3)
    return points[points[:, 2] >= 0] / count


def primal_dual(problem: Ridge, shares: np.ndarray, slack: float, steps: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """(p, u) after steps down along scores, whose softmax p is, and up along u."""
    multipliers, scores = torch.full((3,), U_START / 3, dtype=torch.float64), np.zeros(3)
    control, a = problem.losses(EQUAL), torch.from_numpy(shares)
    for _ in range(steps):
        p = np.exp(scores - scores.max())
        p /= p.sum()
        slope = problem.gradient(p, minimax_weights(a, multipliers).numpy())
        regrets = torch.from_numpy(problem.losses(p) - control)
        multipliers = moved_multipliers(multipliers, regrets, rate=0.5, slack=slack)
        scores = scores - 0.3 * p * (slope - p @ slope)
    return p, multipliers.numpy()


@pytest.mark.parametrize("slack", [0.0, 0.05])
@pytest.mark.parametrize(
    "shares", [[0.5, 0.5, 0.0], [0.4, 0.4, 0.2]], ids=["held against a reference", "a third set of the guide"]
)
def test_multipliers_find_the_constrained_optimum_of_brute_force(shares: list[float], slack: float) -> None:
    problem, a = Ridge(), np.array(shares)
    points, control = grid(400), problem.losses(EQUAL)
    losses = problem.losses(points)
    allowed = (losses <= control + slack + 1e-9).all(1)
    best, free = points[allowed][np.argmin(losses[allowed] @ a)], points[np.argmin(losses @ a)]
    hurt = problem.losses(free) - control - slack
    assert hurt[2] > 0.1 and (hurt[:2] < 0).all()  # what the mean alone prefers
    p, multipliers = primal_dual(problem, a, slack)
    found = problem.losses(p)
    np.testing.assert_allclose(p, best, atol=0.02)
    assert a @ found == pytest.approx(a @ problem.losses(best), abs=2e-3)
    assert found[2] - control[2] == pytest.approx(slack, abs=1e-4)
    assert (found[:2] < control[:2]).all()
    assert multipliers[2] > 0.05 and multipliers[:2].tolist() == [U_MIN, U_MIN]


def test_without_a_set_that_is_hurt_the_weights_are_the_guides_own() -> None:
    problem, a = Ridge(), np.array([0.9, 0.1, 0.0])
    p, multipliers = primal_dual(problem, a, slack=10.0, steps=1500)
    free = grid(400)[np.argmin(problem.losses(grid(400)) @ a)]
    assert a @ problem.losses(p) == pytest.approx(a @ problem.losses(free), abs=2e-3)
    assert multipliers.tolist() == [U_MIN] * 3


def test_a_set_worse_than_the_control_gains_weight_and_a_better_one_loses_it_to_its_share() -> None:
    a, u = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64)
    weights = [minimax_weights(a, u)]
    for _ in range(40):
        u = moved_multipliers(u, torch.tensor([0.1, -0.3, 0.0], dtype=torch.float64), rate=1.0, slack=0.0)
        weights.append(minimax_weights(a, u))
    steps = torch.stack(weights)
    torch.testing.assert_close(steps.sum(1), torch.ones(41, dtype=torch.float64))
    assert (steps[1:, 0] > steps[:-1, 0]).all() and (steps[1:, 1] < steps[:-1, 1]).all()
    assert u[2] == 0.5 and u[1] == U_MIN
    for _ in range(200):
        u = moved_multipliers(u, torch.full((3,), -0.3, dtype=torch.float64), rate=1.0, slack=0.0)
    torch.testing.assert_close(minimax_weights(a, u), a, rtol=0, atol=2e-3)
    torch.testing.assert_close(minimax_weights(torch.zeros(3), u)[0].item(), U_MIN / (1 + 3 * U_MIN))
    u = moved_multipliers(u, torch.full((3,), 1e6, dtype=torch.float64), rate=1.0, slack=0.0)
    assert u.tolist() == [U_MAX] * 3  # and no overflow


def test_slack_is_what_a_set_may_be_worse_by() -> None:
    u = torch.full((2,), 0.5, dtype=torch.float64)
    moved = moved_multipliers(u, torch.tensor([0.3, 0.1], dtype=torch.float64), rate=0.5, slack=0.2)
    np.testing.assert_allclose(moved, [0.5 * math.exp(0.05), 0.5 * math.exp(-0.05)], rtol=1e-12)


class NaiveControl:
    """AdamW, written out, along plain autograd of (3) with equal weights; fp64."""

    def __init__(self, trainer: MinimaxTrainer) -> None:
        self.model, self.trainer, self.step_number = copy.deepcopy(trainer.proxy), trainer, 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.model.parameters()]

    def step(self) -> None:
        batch, config = self.trainer.train.at(self.step_number), OPTIMIZER
        equal = torch.full((len(batch),), 1 / len(batch), dtype=torch.float64)
        parameters = dict(self.model.named_parameters())
        options = {"kl_weight": CONFIG.kl_weight, "kl_direction": CONFIG.kl_direction, "l2_weight": CONFIG.l2_weight}
        loss = reference.lower(
            self.model, parameters, batch, equal, teacher=self.trainer.teacher(batch.tokens), **options
        )
        gradient = torch.autograd.grad(loss, list(parameters.values()))
        norm = torch.sqrt(sum(g.square().sum() for g in gradient))
        scale = min(1.0, config.clip_grad / (float(norm) + 1e-6))
        self.step_number += 1
        beta1, beta2 = config.adam_beta1, config.adam_beta2
        with torch.no_grad():
            for p, g, (m, v) in zip(parameters.values(), gradient, self.moments, strict=True):
                g = g * scale
                m.copy_(beta1 * m + (1 - beta1) * g)
                v.copy_(beta2 * v + (1 - beta2) * g * g)
                p.mul_(1 - config.lr * config.weight_decay * (p.ndim > 1))
                root = (v / (1 - beta2**self.step_number)).sqrt() + config.adam_eps
                p.sub_(config.lr * m / (1 - beta1**self.step_number) / root)


def naive_losses(trainer: MinimaxTrainer, model: torch.nn.Module, number: int) -> list[torch.Tensor]:
    """Phi_k of each set's own samples in a validation batch."""
    batch = trainer.validation.at(number)
    sets = trainer.validation.source.set_of(batch.unit_ids.numpy())
    parameters = dict(model.named_parameters())
    found = []
    for k in range(len(SETS)):
        rows = np.flatnonzero(sets == k)
        part = batch.slice(int(rows[0]), int(rows[-1]) + 1)
        found.append(reference.upper(model, parameters, part))
    return found


def test_regrets_weights_and_phi_are_those_of_a_naive_account_in_fp64(monkeypatch) -> None:
    trainer = make_trainer(MINIMAX, torch.float64, ALONE, trainer=MinimaxTrainer)
    control, seen = NaiveControl(trainer), {}
    honest = MinimaxLevel.step

    def observed(self, proxy, number):
        seen["proxy"] = copy.deepcopy(trainer.proxy)  # after the lower steps but one
        seen["found"], values = honest(self, proxy, number)
        seen["gradient"] = seen["found"].gradient.flat.clone()  # the solver may overwrite it
        return seen["found"], values

    monkeypatch.setattr(MinimaxLevel, "step", observed)
    a, u = np.array(SHARES) / sum(SHARES), np.full(3, 0.1 / 3)
    for number in range(3):
        values = trainer.step()
        for _ in range(MINIMAX.lower_iters - 1):
            control.step()
        losses, w = naive_losses(trainer, seen["proxy"], number), (a + u) / (1 + u.sum())
        with torch.no_grad():
            regrets = np.array([float(one) for one in losses])
            regrets -= [float(one) for one in naive_losses(trainer, control.model, number)]
        phi = sum(weight * loss for weight, loss in zip(w, losses, strict=True))
        gradient = reference.flat(torch.autograd.grad(phi, list(seen["proxy"].parameters())))
        assert float(seen["found"].loss) == pytest.approx(float(phi), rel=1e-6)  # v is fp32
        torch.testing.assert_close(seen["gradient"], gradient, rtol=1e-5, atol=1e-7)
        mean = sum(share * float(loss) for share, loss in zip(a, losses, strict=True))
        assert values["validation_loss"] == pytest.approx(mean, rel=1e-6)
        for k, name in enumerate(SETS):
            assert values[f"validation_loss_{name}"] == pytest.approx(float(losses[k]), rel=1e-6)
            assert values[f"regret_{name}"] == pytest.approx(regrets[k], rel=1e-5, abs=1e-9)
            assert values[f"guide_weight_{name}"] == pytest.approx(w[k], rel=1e-6)
        u = np.clip(u * np.exp(RATE * (regrets - SLACK)), U_MIN, U_MAX)
        np.testing.assert_allclose(trainer.upper.multipliers, u, rtol=1e-6)
        control.step()
        found = reference.flat(trainer.upper.control.model.parameters()).detach()
        torch.testing.assert_close(found, reference.flat(control.model.parameters()).detach(), rtol=1e-7, atol=1e-7)
    assert max(abs(regrets)) > 1e-5  # the two differ, so the account above says something


def test_proxy_and_control_start_equal_to_the_last_bit() -> None:
    config = dataclasses.replace(MINIMAX, lower_iters=1)
    trainer = make_trainer(config, torch.float32, ALONE, trainer=MinimaxTrainer)
    values = trainer.step()
    assert [values[f"regret_{name}"] for name in SETS] == [0.0] * 3


def test_one_set_is_a_constraint_that_changes_no_weight() -> None:
    """With one set w = 1 whatever u is: the same steps as with fixed weights."""
    moves = {}
    for weighting in ("fixed", "minimax"):
        config = dataclasses.replace(CONFIG, guide_weighting=weighting)
        trainer = make_trainer(config, torch.float64, ALONE, trainer=GuidedTrainer.of(("a",), (1.0,)))
        values = [trainer.step() for _ in range(2)][-1]
        moves[weighting] = reference.parameters_of(trainer.score_model), values["validation_loss"]
    torch.testing.assert_close(moves["minimax"], moves["fixed"], rtol=1e-6, atol=1e-9)
    assert values["guide_weight_a"] == 1.0


def test_a_plain_set_is_refused() -> None:
    with pytest.raises(ValueError, match="found a RandomUnits as the guide of minimax, expected GuideSets"):
        make_trainer(MINIMAX, torch.float64, ALONE)


def test_a_control_that_differs_between_ranks_would_be_seen() -> None:
    trainer = make_trainer(MINIMAX, torch.float64, ALONE, trainer=MinimaxTrainer)
    assert trainer.upper.replicas().keys() == {"control", "guide multipliers"}
    trainer.watch(trainer.step())


def test_a_control_costs_a_gradient_a_lower_step_and_a_forward_pass_an_upper_step() -> None:
    proxy = make_trainer(CONFIG, torch.float64, ALONE).proxy.architecture
    held, plain = (bilevel_flops(config, proxy, proxy, 9) for config in (MINIMAX, CONFIG))
    forward = flops_per_token(proxy, 9) * 9
    step = CONFIG.lower_iters * GRADIENT_PASSES * CONFIG.global_batch_size * forward
    step += CONFIG.validation_batch_size * forward
    assert held - plain == pytest.approx(CONFIG.upper_iters * step, rel=1e-12)
