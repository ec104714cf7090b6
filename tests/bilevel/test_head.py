"""The fused head where it could go wrong on its own: extreme logits, chunk sizes, a teacher of another width."""

import pytest
import torch

from megatron_bliss.bilevel import head
from tests.bilevel.problems import random_teacher, relative_error


def terms(count, vocab, direction="proxy_to_target", teacher=None):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, vocab, (count,), generator=generator)
    positions = head.Positions(torch.zeros(count, dtype=torch.int64), torch.arange(count), labels)
    coefficients = torch.rand(2, count, generator=generator, dtype=torch.float64)
    return head.Terms(positions, *coefficients, teacher, direction)


def problem(count=21, vocab=11, width=5, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(count, width, generator=generator, dtype=torch.float64) * scale
    return hidden, torch.randn(vocab, width, generator=generator, dtype=torch.float64)


def loss_of(hidden, weight, terms):
    log_p = (hidden @ weight.T).log_softmax(-1)
    loss = -terms.cross_entropy @ log_p.gather(1, terms.positions.labels[:, None]).squeeze(1)
    if terms.teacher is not None:
        log_t = (terms.teacher.hidden_states[0] @ terms.teacher.output_weight.T).log_softmax(-1)
        left, right = (log_p, log_t) if terms.kl_direction == "proxy_to_target" else (log_t, log_p)
        loss = loss + terms.divergence @ (left.exp() * (left - right)).sum(-1)
    return loss


@pytest.mark.parametrize("direction", head.KL_DIRECTIONS)
@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_gradient_for_every_chunk_size(direction, chunk, monkeypatch):
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", chunk)
    hidden, weight = problem()
    options = terms(21, 11, direction, random_teacher(1, 21, 11, 3))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(loss_of(*leaves, options), leaves)
    total = torch.zeros_like(weight)
    with torch.no_grad():
        found = head.head_gradient(hidden, weight, options, total)
    assert relative_error(found.adjoint, expected[0]) < 1e-12
    assert relative_error(total, expected[1]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(dtype):
    """Probabilities underflow, and so does the label's: the loss is still the difference of logits."""
    hidden, weight = (t.to(dtype) for t in problem(scale=1e3))
    options = terms(21, 11)
    found = head.evaluate_head(hidden, weight, options).cross_entropy
    logits = hidden.double() @ weight.double().T
    expected = logits.logsumexp(-1) - logits.gather(1, options.positions.labels[:, None]).squeeze(1)
    assert float(expected.max()) > 1e3
    assert relative_error(found.double(), expected) < 10 * torch.finfo(dtype).eps * 100


def test_position_without_weight_gets_no_gradient():
    hidden, weight = problem()
    options = terms(21, 11, teacher=random_teacher(1, 21, 11, 3))
    options.cross_entropy[4] = options.divergence[4] = 0.0
    found = head.head_gradient(hidden, weight, options, torch.zeros_like(weight))
    assert not found.adjoint[4].any() and torch.isfinite(found.adjoint).all() and found.adjoint[5].any()


@pytest.mark.parametrize(("count", "vocab"), [(4092, 50304), (2016, 2048), (40, 50304), (3, 10), (100_000, 256_000)])
def test_chunks_are_a_fraction_of_the_positions(count, vocab):
    size = head.chunk_size(count, vocab, torch.device("cpu"))
    assert 1 <= size <= max(count / 8 + 8, 16)
    assert size <= count and size * vocab <= max(head.CHUNK_ELEMENTS["cpu"] + 8 * vocab, 16 * vocab)
