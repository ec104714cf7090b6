"""What ``benchmark.py bilevel`` measures the engine against is right, in fp64."""

import torch

from megatron_bliss.data.batches import Batch
from tests.bilevel import reference
from tests.bilevel.problems import language_model, random_batch, random_vector, random_weights, relative_error
from tools.benchmarks.cases import autograd_gradient, double_backward

EXACT = 1e-9


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def test_plain_gradient_and_double_backward_are_right() -> None:
    proxy = language_model()
    batch, weights, z = random_batch(3, 9), random_weights(3), random_vector(proxy)
    full = Batch(batch.tokens, (torch.arange(9) > 0).expand(3, 9), torch.full((3,), 9), batch.unit_ids)
    expected = reference.gradient(proxy, full, weights)[1]
    assert relative_error(flat(autograd_gradient(proxy, full, weights)), expected) < EXACT
    expected = reference.hessian_product(proxy, batch, weights, z)
    assert relative_error(flat(double_backward(proxy, batch, weights, z)), expected) < EXACT
