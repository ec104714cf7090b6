"""A proxy tied to the target without a score model: against the lower level's definition, on ranks, and resumed."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_bliss.base.parallel import World
from megatron_bliss.bilevel.flops import GRADIENT_PASSES
from megatron_bliss.bilevel.losses import total_loss
from megatron_bliss.bilevel.tied import TiedProxyTrainer, tied_flops
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.models.optimizer import Optimizer
from megatron_bliss.models.presets import flops_per_token
from tests.bilevel import reference
from tests.bilevel.trainers import ALONE, CONFIG, make_trainer
from tests.distributed import run_distributed


def tied(config: BilevelConfig = CONFIG, dtype: torch.dtype = torch.float64, world: World = ALONE) -> TiedProxyTrainer:
    def without_scores(config, proxy, score_model, *others) -> TiedProxyTrainer:
        return TiedProxyTrainer(config, proxy, None, *others)

    return make_trainer(config, dtype, world, trainer=without_scores)


def weights_of(trainer: TiedProxyTrainer) -> np.ndarray:
    return torch.nn.utils.parameters_to_vector(trainer.proxy.parameters()).detach().numpy()


def trained(steps: int, config: BilevelConfig = CONFIG, **options) -> TiedProxyTrainer:
    trainer = tied(config, **options)
    for _ in range(steps):
        trainer.watch(trainer.step())
    return trainer


def test_steps_are_those_of_the_lower_level_with_equal_weights() -> None:
    """T steps of AdamW along the gradient of (3), which plain autograd takes of its definition, in fp64."""
    trainer = tied()
    model = copy.deepcopy(trainer.proxy)
    optimizer = Optimizer(model, CONFIG.proxy_optimizer, CONFIG.upper_iters * CONFIG.lower_iters)
    options = {"kl_weight": CONFIG.kl_weight, "kl_direction": CONFIG.kl_direction, "l2_weight": CONFIG.l2_weight}
    for number in range(2 * CONFIG.lower_iters):
        batch = trainer.train.at(number)
        equal = torch.full((len(batch),), 1 / len(batch), dtype=torch.float64)
        parameters = dict(model.named_parameters())
        loss = reference.lower(model, parameters, batch, equal, teacher=trainer.teacher(batch.tokens), **options)
        found = torch.autograd.grad(loss, list(parameters.values()))
        optimizer.step(dict(zip(parameters, found, strict=True)))
    logged = [trainer.step() for _ in range(2)]
    np.testing.assert_allclose(weights_of(trainer), reference.flat(model.parameters()).detach(), rtol=1e-9, atol=1e-11)
    assert logged[-1]["lower_loss"] == pytest.approx(loss.item(), rel=1e-9) and logged[-1]["kl"] > 0
    assert logged[0]["validation_loss"] != logged[1]["validation_loss"]


def test_the_validation_loss_is_the_mean_over_all_labelled_tokens() -> None:
    trainer = tied()
    batch = trainer.validation.at(0)
    model = copy.deepcopy(trainer.proxy)
    expected = float(reference.upper(model, dict(model.named_parameters()), batch))
    assert trainer.step()["validation_loss"] == pytest.approx(expected, rel=1e-6)
    assert total_loss(model, batch.slice(0, 0)).tolist() == [0.0, 0.0]


def test_the_kl_term_holds_the_proxy_at_the_target() -> None:
    def kl(weight: float) -> float:
        config = dataclasses.replace(CONFIG, kl_weight=weight, upper_iters=40)
        trainer = trained(40, config)
        return _kl_to_target(trainer)

    untied, paper, strong = kl(1e-9), kl(0.3), kl(30.0)
    assert strong < 0.5 * paper < 0.5 * untied


def _kl_to_target(trainer: TiedProxyTrainer) -> float:
    batch = trainer.train.at(0)
    teacher = trainer.teacher(batch.tokens)
    with torch.no_grad():
        logits = trainer.proxy.hidden_states(batch.tokens) @ trainer.proxy.output_weight.T
        other = teacher.hidden_states @ teacher.output_weight.T
        log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1)[:, :-1][batch.label_mask[:, 1:]].mean())


def on_ranks(rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    world = World(dist.group.WORLD, rank, world_size, torch.device("cpu"))
    few = dataclasses.replace(CONFIG, global_batch_size=3, validation_batch_size=1)
    return weights_of(trained(3, world=world)), weights_of(trained(3, few, world=world))


@pytest.mark.parametrize("world_size", [2, 4])
def test_steps_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    """Nor do they where ranks have no sample."""
    few = dataclasses.replace(CONFIG, global_batch_size=3, validation_batch_size=1)
    expected = weights_of(trained(3)), weights_of(trained(3, few))
    for found in run_distributed(on_ranks, world_size):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)


def test_a_resumed_stage_ends_with_the_same_bits() -> None:
    whole, half = trained(3, dtype=torch.float32), trained(1, dtype=torch.float32)
    resumed = tied(dtype=torch.float32)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    for _ in range(2):
        resumed.watch(resumed.step())
    assert np.array_equal(weights_of(resumed), weights_of(whole))
    assert resumed.monitors.validation_loss == whole.monitors.validation_loss


def test_what_is_learned_is_the_proxy_and_its_moments_by_name() -> None:
    trainer = trained(2)
    learned = trainer.learned()
    assert "score_model" not in learned and learned["adam"]["step"] == 2 * CONFIG.lower_iters
    for name, weight in trainer.proxy.named_parameters():
        state = trainer.optimizer.adamw.state[weight]
        first, second = learned["adam"]["moments"][name]
        assert torch.equal(first, state["exp_avg"]) and torch.equal(second, state["exp_avg_sq"]) and second.any()
        assert torch.equal(learned["proxy"][name], weight)


def test_work_is_a_gradient_a_lower_step_and_a_forward_pass_an_upper_one() -> None:
    proxy = tied().proxy.architecture
    target = dataclasses.replace(proxy, hidden_size=24)
    forward, teacher = (flops_per_token(arch, 9) for arch in (proxy, target))
    lower = 2 * 8 * 9 * (GRADIENT_PASSES * forward + teacher)
    assert tied_flops(CONFIG, proxy, target, 9) == 3 * (lower + 6 * 9 * forward)
    untied = dataclasses.replace(CONFIG, kl_weight=0.0)
    assert tied_flops(untied, proxy, target, 9) == 3 * (lower - 2 * 8 * 9 * teacher + 6 * 9 * forward)
