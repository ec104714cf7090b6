"""The published step is what its description says, against the naive implementation, in fp64."""

import copy
import math

import pytest
import torch

from megatron_bliss.bilevel import curvature, published
from megatron_bliss.bilevel.published import PublishedTrainer
from megatron_bliss.config.bilevel import BilevelConfig
from megatron_bliss.config.training import OptimizerConfig
from tests.bilevel import reference
from tests.bilevel.problems import (
    language_model,
    lower_loss,
    random_batch,
    random_teacher,
    random_vector,
    random_weights,
    relative_error,
    score_model,
)
from tests.bilevel.trainers import ALONE

EXACT = 1e-9


@pytest.fixture
def models():
    return language_model(), score_model(seed=5)


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def trainer(models, batch, validation, teacher=None, **options) -> PublishedTrainer:
    config = BilevelConfig(
        kl_weight=0.3 if teacher else 0.0,
        l2_weight=0.02,
        global_batch_size=len(batch),
        proxy_optimizer=OptimizerConfig(lr=1e-2),
        score_optimizer=OptimizerConfig(lr=1e-2),
        **options,
    )
    teach = (lambda tokens: teacher) if teacher else None
    return PublishedTrainer(config, *models, teach, Same(batch), Same(validation), ALONE)


@pytest.mark.parametrize("kl_direction", ["proxy_to_target", "target_to_proxy"])
def test_lower_loss_and_its_hessian_are_those_of_the_lower_level(models, kl_direction: str) -> None:
    proxy, score = models
    batch, teacher = random_batch(3, 9), random_teacher(3, 9)
    step = trainer(models, batch, batch, teacher, kl_direction=kl_direction)
    options = {"teacher": teacher, "kl_weight": 0.3, "kl_direction": kl_direction, "l2_weight": 0.02}
    weights = reference.weights(score(batch.tokens, batch.lengths)).detach()
    parameters = list(proxy.parameters())
    loss = step._lower_level(batch).loss
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    expected_loss, expected_gradient = reference.gradient(proxy, batch, weights, **options)
    assert relative_error(loss, expected_loss) < EXACT
    assert relative_error(flat(gradient), expected_gradient) < EXACT
    start = [torch.full_like(parameter, 1 / parameter.numel()) for parameter in parameters]
    product = published.hessian_product(gradient, parameters, start, retain_graph=False)
    expected = reference.hessian_product(proxy, batch, weights, flat(start), **options)
    assert relative_error(flat(product), expected) < EXACT


def test_solve_takes_three_clipped_steps_from_one_over_numel(models) -> None:
    proxy, _ = models
    batch, weights = random_batch(3, 9), random_weights(3)
    parameters = list(proxy.parameters())
    b = [30.0 * part.view_as(p) for part, p in zip(_split(random_vector(proxy), parameters), parameters, strict=True)]
    loss = weights @ published.sample_losses(proxy, batch)[0]
    z = published.solve(torch.autograd.grad(loss, parameters, create_graph=True), parameters, b)
    expected = [torch.full_like(parameter, 1 / parameter.numel()) for parameter in parameters]
    for _ in range(3):
        product = _split(reference.hessian_product(proxy, batch, weights, flat(expected)), parameters)
        for index, part in enumerate(product):
            residual = part.view_as(expected[index]) - b[index] + 0.01 * expected[index]
            norm = float(residual.norm())
            expected[index] = expected[index] - 0.01 * residual / max(1.0, norm + 1e-6)
    assert relative_error(flat(z), flat(expected)) < EXACT


def test_hypergradient_from_per_sample_gradients_is_equation_7_and_influence(models) -> None:
    proxy, score = models
    batch, z = random_batch(4, 9), random_vector(proxy)
    parameters = list(proxy.parameters())
    split = [part.view_as(p) for part, p in zip(_split(z, parameters), parameters, strict=True)]
    found = published.hypergradient(proxy, score, batch, split)
    assert relative_error(flat(found), reference.hypergradient(score, batch, z, proxy)) < EXACT
    losses = published.sample_losses(proxy, batch)[0]
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    influence = torch.stack([published.influence_of(row, split) for row in rows])
    walk = curvature.curvature_product(proxy, lower_loss(batch, random_weights(4)), z)
    assert relative_error(influence, walk.influence) < EXACT


def test_validation_gradient_is_that_of_the_upper_level(models) -> None:
    validation = random_batch(3, 8, seed=4)
    _, gradient = published.validation_gradient(models[0], validation)
    assert relative_error(flat(gradient), reference.upper_gradient(models[0], validation)) < EXACT


def test_clipping_is_tensor_by_tensor() -> None:
    small, large = torch.tensor([0.3, 0.4]), torch.tensor([[30.0, 40.0]])
    found = published.clip_each([small, large])
    assert torch.equal(found[0], small) and torch.allclose(found[1], large / 50)


def test_a_step_moves_both_models_and_draws_batches_in_order(models) -> None:
    before = copy.deepcopy(models)
    batch, validation = random_batch(3, 9), random_batch(3, 8, seed=4)
    step = trainer(models, batch, validation, random_teacher(3, 9), lower_iters=2)
    for _ in range(2):
        found = step.step()
        assert all(math.isfinite(value) for name, value in found.items() if name != "residual")
    assert step.train.asked == [0, 1, 2, 3, 4, 5] and step.validation.asked == [0, 1]
    for old, new in zip(before, models, strict=True):
        assert not torch.allclose(reference.parameters_of(old), reference.parameters_of(new))


class Same:
    """A schedule that has one batch for every step."""

    def __init__(self, batch) -> None:
        self.batch, self.asked = batch, []

    def at(self, step: int):
        self.asked.append(step)
        return self.batch


def _split(vector: torch.Tensor, parameters: list) -> list[torch.Tensor]:
    return list(vector.split([parameter.numel() for parameter in parameters]))
