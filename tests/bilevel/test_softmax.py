"""The softmax of one rank; several ranks are in test_ranks.py."""

import pytest
import torch

from megatron_bliss.bilevel.softmax import global_softmax


def test_value_and_gradient_are_softmax():
    scores = torch.randn(7, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(7, dtype=torch.float64)
    found = global_softmax(scores)
    torch.testing.assert_close(found, scores.softmax(0))
    expected = torch.autograd.grad(scores.softmax(0), scores, cotangent)
    torch.testing.assert_close(torch.autograd.grad(found, scores, cotangent), expected)


def test_stable_for_large_scores():
    found = global_softmax(torch.tensor([1e4, 1e4, -1e4]))
    assert found.tolist() == [0.5, 0.5, 0.0]


def test_non_finite_scores_are_named():
    scores = torch.tensor([0.1, float("nan"), 0.3, float("inf")])
    with pytest.raises(ValueError) as error:
        global_softmax(scores, unit_ids=torch.tensor([5, 6, 7, 8]), micro_batch_size=2)
    for part in ("rank 0 micro-batch 0 position 1 unit 6: nan", "rank 0 micro-batch 1 position 1 unit 8: inf", "lower"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="4 more"):
        global_softmax(torch.full((12,), float("nan")))
