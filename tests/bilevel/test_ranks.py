"""The same numbers on 1, 2 and 4 ranks and for every micro-batch split; the same error everywhere."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_bliss.bilevel import curvature, hypergradient
from megatron_bliss.bilevel.execution import Execution
from megatron_bliss.bilevel.objective import validation_loss
from megatron_bliss.bilevel.softmax import global_softmax
from tests.bilevel.problems import (
    language_model,
    lower_loss,
    random_batch,
    random_teacher,
    random_vector,
    score_model,
)
from tests.distributed import run_distributed

SAMPLES, LENGTH = 8, 9
SPLITS = {1: [(0, 8)], 2: [(0, 3), (3, 8)], 4: [(0, 1), (1, 1), (1, 6), (6, 8)]}  # one rank of four owns nothing
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def step(start, stop, group, dtype, micro):
    """One upper step over samples ``start`` to ``stop`` of the global batch: everything that ranks must agree on."""
    model, scorer = language_model(dtype=dtype), score_model("llama", dtype=dtype)
    batch, validation = (
        random_batch(SAMPLES, LENGTH).slice(start, stop),
        random_batch(SAMPLES, 7, seed=5).slice(start, stop),
    )
    teacher, execution = random_teacher(SAMPLES, LENGTH, dtype=dtype).slice(start, stop), Execution(group, micro)
    P = global_softmax(hypergradient.score_batch(scorer, batch, micro_batch_size=micro), group)
    G = lower_loss(batch, P, teacher=teacher, kl_weight=0.3, l2_weight=0.01, num_samples=SAMPLES)
    z = random_vector(model)
    results = {}
    for name in curvature.CURVATURES:
        walk = curvature.curvature_product(model, G, z, execution, curvature=name)
        results[name] = torch.cat([walk.product.flat, walk.gradient.flat, walk.loss[None], walk.kl[None]])
    for name, loss in {"gradient": G, "upper": validation_loss(validation, group, dtype)}.items():
        found = curvature.gradient(model, loss, execution)
        results[name] = torch.cat([found.gradient.flat, found.loss[None]])
    coefficients = hypergradient.hypergradient_coefficients(P, walk.influence, group)
    upper = hypergradient.hypergradient(scorer, batch, coefficients, execution)
    results["hypergradient"] = upper.flat
    results["local"] = torch.stack([P, walk.influence, walk.sample_losses, coefficients.to(dtype)])
    return {name: value.detach().double().numpy() for name, value in results.items()}


def softmax_backward(start, stop, group):
    scores = torch.arange(SAMPLES, dtype=torch.float64)[start:stop].sin().requires_grad_()
    cotangent = torch.arange(SAMPLES, dtype=torch.float64)[start:stop].cos()
    return torch.autograd.grad(global_softmax(scores, group), scores, cotangent)[0].numpy()


def error_text(rank, group):
    scores = torch.zeros(4)
    if rank == 1:
        scores[3] = float("nan")
    with pytest.raises(ValueError) as error:
        global_softmax(scores, group, unit_ids=10 * rank + torch.arange(4), micro_batch_size=2)
    return str(error.value)


def on_rank(rank, world_size):
    start, stop = SPLITS[world_size][rank]
    group = dist.group.WORLD
    steps = {(dtype, micro): step(start, stop, group, dtype, micro) for dtype in TOLERANCE for micro in (0, 2)}
    return steps, softmax_backward(start, stop, group), error_text(rank, group)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_and_micro_batches_change_nothing(world_size):
    expected = {dtype: step(0, SAMPLES, None, dtype, 0) for dtype in TOLERANCE}
    ranks = run_distributed(on_rank, world_size)
    for key in ranks[0][0]:
        for name, value in expected[key[0]].items():
            scale = TOLERANCE[key[0]] * np.abs(value).max()
            parts = [steps[key][name] for steps, _, _ in ranks]
            for found in [np.concatenate(parts, 1)] if name == "local" else parts:
                assert np.abs(found - value).max() < scale, (name, key)
            assert name == "local" or all(np.array_equal(part, parts[0]) for part in parts)
    backward = np.concatenate([part for _, part, _ in ranks])
    np.testing.assert_allclose(backward, softmax_backward(0, SAMPLES, None), atol=1e-15)
    errors = {text for _, _, text in ranks}
    assert len(errors) == 1 and "rank 1 micro-batch 1 position 1 unit 13: nan" in errors.pop()
