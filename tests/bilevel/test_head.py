"""The fused head against autograd on whole logits, and where it could go wrong alone: extreme logits, chunk sizes."""

import pytest
import torch

from megatron_bliss.bilevel import head
from tests.bilevel.problems import random_teacher, relative_error

LOSSES = ["cross_entropy", *head.KL_DIRECTIONS]


def terms(count, vocab, direction="proxy_to_target", teacher=None):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, vocab, (count,), generator=generator)
    positions = head.Positions(torch.zeros(count, dtype=torch.int64), torch.arange(count), labels)
    coefficients = torch.rand(2, count, generator=generator, dtype=torch.float64)
    return head.Terms(positions, *coefficients, teacher, direction)


def problem(count=21, vocab=11, width=5, scale=1.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=generator, dtype=torch.float64) * scale
    return hidden, torch.randn(vocab, width, generator=generator, dtype=torch.float64)


def teaching(loss):
    """Terms of 21 positions and 11 tokens, with a teacher of another width unless the loss is cross-entropy alone."""
    if loss == "cross_entropy":
        return terms(21, 11)
    return terms(21, 11, loss, random_teacher(1, 21, 11, 3))


def losses_of(hidden, weight, terms):
    """Cross-entropy and KL of every position by whole logits."""
    log_p = (hidden @ weight.T).log_softmax(-1)
    cross_entropy = -log_p.gather(1, terms.positions.labels[:, None]).squeeze(1)
    if terms.teacher is None:
        return cross_entropy, torch.zeros_like(cross_entropy)
    log_t = (terms.teacher.hidden_states[0] @ terms.teacher.output_weight.T).log_softmax(-1)
    left, right = (log_p, log_t) if terms.kl_direction == "proxy_to_target" else (log_t, log_p)
    return cross_entropy, (left.exp() * (left - right)).sum(-1)


def loss_of(hidden, weight, terms):
    cross_entropy, kl = losses_of(hidden, weight, terms)
    return terms.cross_entropy @ cross_entropy + (terms.divergence @ kl if terms.teacher is not None else 0.0)


def gauss_newton_of(hidden, weight, tangents, terms):
    """Jᵀ m (diag p - p pᵀ) J along the tangents, J the Jacobian of the logits."""
    logits, tangent = torch.autograd.functional.jvp(lambda h, w: h @ w.T, (hidden, weight), tangents)
    p = logits.softmax(-1)
    mass = terms.cross_entropy + (terms.divergence if terms.teacher is not None else 0.0)
    image = mass[:, None] * p * (tangent - (p * tangent).sum(-1, keepdim=True))
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    return torch.autograd.grad(leaves[0] @ leaves[1].T, leaves, image)


def hessian_of(hidden, weight, tangents, terms):
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    first = torch.autograd.grad(loss_of(*leaves, terms), leaves, create_graph=True)
    return torch.autograd.grad(sum((g * t).sum() for g, t in zip(first, tangents, strict=True)), leaves)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_gradient_for_every_chunk_size(loss, chunk, monkeypatch):
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", chunk)
    hidden, weight = problem()
    options = teaching(loss)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(loss_of(*leaves, options), leaves)
    total = torch.ones_like(weight)
    with torch.no_grad():
        found = head.head_gradient(hidden, weight, options, total)
        cross_entropy, kl = losses_of(hidden, weight, options)
    assert relative_error(found.adjoint, expected[0]) < 1e-12
    assert relative_error(total - 1, expected[1]) < 1e-12
    torch.testing.assert_close(found.cross_entropy, cross_entropy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.kl, kl, rtol=1e-12, atol=1e-12)
    assert found.tangent is None


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("gauss_newton", [False, True])
@pytest.mark.parametrize("chunk", [1, 10**6])
def test_tangents_are_derivatives_along_the_direction(loss, gauss_newton, chunk, monkeypatch):
    """Of the cross-entropy, of the adjoint and of the output matrix's gradient; the gradient itself stays."""
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", chunk)
    values, tangents, options = problem(), problem(seed=2), teaching(loss)
    sums = torch.ones(2, *values[1].shape, dtype=torch.float64)
    dual = torch.stack((values[0], tangents[0]))
    found = head.head_curvature(dual, values[1], tangents[1], options, *sums, gauss_newton=gauss_newton)
    expected = (gauss_newton_of if gauss_newton else hessian_of)(*values, tangents, options)
    assert relative_error(found.adjoint[0], expected[0]) < 1e-12
    assert relative_error(sums[1] - 1, expected[1]) < 1e-12
    along = torch.autograd.functional.jvp(lambda h, w: losses_of(h, w, options)[0], values, tangents)[1]
    assert relative_error(found.tangent, along) < 1e-12
    gradient = torch.ones_like(values[1])
    plain = head.head_gradient(*values, options, gradient)
    assert relative_error(found.adjoint[1], plain.adjoint) < 1e-14 and relative_error(sums[0], gradient) < 1e-14
    assert torch.equal(found.cross_entropy, plain.cross_entropy) and torch.equal(found.kl, plain.kl)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(loss, dtype):
    """Probabilities underflow, and so does the label's: the loss is still the difference of logits."""
    hidden, weight = (t.to(dtype) for t in problem(scale=1e3))
    options = teaching(loss)
    if options.teacher is not None:
        options = options._replace(teacher=head.Teacher(*(t.to(dtype) for t in options.teacher)))
    found = head.head_gradient(hidden, weight, options, torch.zeros_like(weight))
    expected = losses_of(hidden.double(), weight.double(), options._replace(teacher=None))[0]
    assert float(expected.max()) > 1e3
    assert relative_error(found.cross_entropy.double(), expected) < 10 * torch.finfo(dtype).eps * 100
    assert torch.isfinite(found.kl).all() and torch.isfinite(found.adjoint).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_position_without_weight_gets_no_gradient(loss):
    hidden, weight = problem()
    options = teaching(loss)
    options.cross_entropy[4] = options.divergence[4] = 0.0
    found = head.head_gradient(hidden, weight, options, torch.zeros_like(weight))
    assert not found.adjoint[4].any() and torch.isfinite(found.adjoint).all() and found.adjoint[5].any()
    sums, dual = torch.zeros(2, *weight.shape, dtype=weight.dtype), torch.stack((hidden, hidden))
    found = head.head_curvature(dual, weight, weight, options, *sums, gauss_newton=False)
    assert not found.adjoint[:, 4].any() and torch.isfinite(found.adjoint).all() and found.adjoint[0, 5].any()


def test_no_labelled_position_adds_nothing():
    hidden, weight = problem(count=0)
    sums = torch.zeros(2, *weight.shape, dtype=weight.dtype)
    found = head.head_curvature(hidden.expand(2, 0, 5), weight, weight, terms(0, 11), *sums, gauss_newton=False)
    assert [len(part) for part in found[:3]] == [0, 0, 0] and found.adjoint.shape == (2, 0, 5) and not sums.any()


@pytest.mark.parametrize(("count", "vocab"), [(4092, 50304), (2016, 2048), (40, 50304), (3, 10), (100_000, 256_000)])
def test_chunks_are_a_fraction_of_the_positions(count, vocab):
    size = head.chunk_size(count, vocab, torch.device("cpu"))
    assert 1 <= size <= max(count / 8 + 8, 16)
    assert size <= count and size * vocab <= max(head.CHUNK_ELEMENTS["cpu"] + 8 * vocab, 16 * vocab)
