"""Equation (7): against per-sample gradients, and finite differences of Phi through the solved lower level."""

import pytest
import torch
from torch.func import functional_call

from megatron_bliss.bilevel import curvature, hypergradient
from megatron_bliss.bilevel.execution import Execution
from megatron_bliss.bilevel.objective import validation_loss
from megatron_bliss.bilevel.softmax import global_softmax
from megatron_bliss.config.models import ScoreConfig
from megatron_bliss.models.score import build_score_model
from tests.bilevel import reference
from tests.bilevel.problems import (
    architecture,
    language_model,
    lower_loss,
    random_batch,
    random_teacher,
    random_vector,
    relative_error,
    score_model,
)


@pytest.mark.parametrize("micro", [0, 2])
@pytest.mark.parametrize("activation", ["sigmoid", "identity"])
def test_equals_per_sample_gradients(micro, activation):
    compare_with_per_sample_gradients(score_model("llama", activation=activation, seed=3), micro)


@pytest.mark.parametrize("family", ["ngram", "both"])
def test_families_with_ngrams_equal_per_sample_gradients(family):
    config = ScoreConfig(family=family, head_init_std=1.0, ngram_buckets=61)
    scorer = build_score_model(config, architecture(), seed=3, eod=1, dtype=torch.float64)
    with torch.no_grad():
        scorer.ngrams.table.copy_(torch.randn(scorer.ngrams.table.shape, generator=torch.Generator().manual_seed(1)))
    compare_with_per_sample_gradients(scorer, micro=2)


def compare_with_per_sample_gradients(scorer, micro):
    model, batch = language_model(), random_batch(5, 9)
    z = random_vector(model)
    scores = hypergradient.score_batch(scorer, batch, micro_batch_size=micro)
    P = global_softmax(scores)
    walk = curvature.curvature_product(model, lower_loss(batch, P), z)
    coefficients = hypergradient.hypergradient_coefficients(P, walk.influence)
    found = hypergradient.hypergradient(scorer, batch, coefficients, Execution(micro_batch_size=micro))
    assert relative_error(found.flat, reference.hypergradient(scorer, batch, z, model)) < 1e-9


def test_coefficients_add_up_to_nothing_and_ignore_a_constant():
    P, d = torch.rand(6, dtype=torch.float64).softmax(0), torch.randn(6, dtype=torch.float64)
    c = hypergradient.hypergradient_coefficients(P, d)
    assert abs(float(c.sum())) < 1e-15 and float(c.abs().max()) > 1e-3
    torch.testing.assert_close(hypergradient.hypergradient_coefficients(P, d + 7.0), c)
    with pytest.raises(ValueError, match="coefficients of shape"):
        hypergradient.hypergradient(score_model(), random_batch(5, 9), c)


class Inner:
    """A tiny lower level that is solved to convergence, as a function of the sample weights."""

    def __init__(self):
        sizes = {"vocab": 4, "width": 4, "heads": 1, "layers": 1, "ffn": 2}
        self.model, self.batch = language_model(tied=True, **sizes), random_batch(6, 6, vocab=4)
        self.validation = random_batch(4, 6, vocab=4, seed=9)
        self.options = {
            "teacher": random_teacher(6, 6, 4),
            "kl_weight": 0.1,
            "kl_direction": "proxy_to_target",
            "l2_weight": 0.03,
        }
        self.scorer = score_model("llama", activation="identity", seed=2, **sizes)
        P = self.weights(dict(self.scorer.named_parameters()))
        self.theta = self.descend(P)
        for _ in range(6):
            self.inverse = self.pseudo_inverse(P)
            leaf = self.theta.clone().requires_grad_()
            self.theta = self.theta - self.inverse @ torch.autograd.grad(self.lower(P, leaf), leaf)[0]
        self.theta, self.inverse = self.solve(P), self.pseudo_inverse(P)
        assert self.flattest < 1e-9, "the lower level converged to something else than a minimum"

    def lower(self, P, theta):
        return reference.lower(self.model, self.named(theta), self.batch, P, **self.options)

    def named(self, theta):
        parameters = dict(self.model.named_parameters())
        parts = theta.split([p.numel() for p in parameters.values()])
        return {n: part.view_as(p) for (n, p), part in zip(parameters.items(), parts, strict=True)}

    def weights(self, scorer_parameters):
        scores = functional_call(self.scorer, scorer_parameters, (self.batch.tokens, self.batch.lengths))
        return reference.weights(scores).detach()

    def descend(self, P):
        """From the initial weights to the neighbourhood of a minimum."""
        theta = reference.parameters_of(self.model).requires_grad_()
        optimiser = torch.optim.LBFGS([theta], max_iter=400, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def closure():
            optimiser.zero_grad()
            value = self.lower(P, theta)
            value.backward()
            return value

        optimiser.step(closure)
        return theta.detach()

    def pseudo_inverse(self, P):
        """Of the engine's Hessian at ``theta``.

        Rotating queries with keys, or values with the output matrix, changes nothing: those directions have curvature 0
        for G and slope 0 for G and Phi, and are left out.
        """
        torch.nn.utils.vector_to_parameters(self.theta, self.model.parameters())
        columns = [
            curvature.curvature_product(self.model, lower_loss(self.batch, P, **self.options), e).product.flat
            for e in torch.eye(len(self.theta), dtype=self.theta.dtype)
        ]
        values, vectors = torch.linalg.eigh(torch.stack(columns))
        curved = values > 1e-3
        self.flattest = float(values[~curved].abs().max()) if bool((~curved).any()) else 0.0
        return vectors[:, curved] @ torch.diag(1 / values[curved]) @ vectors[:, curved].T

    def solve(self, P):
        """Newton's method with one matrix for all steps, from ``theta`` to the minimum for nearby weights."""
        theta = self.theta
        for _ in range(50):
            leaf = theta.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.lower(P, leaf), leaf)
            step = self.inverse @ slope
            theta = theta - step
            if step.norm() < 2e-15:
                break
        assert step.norm() < 2e-12, "the lower level did not converge"
        return theta

    def phi(self, scorer_parameters):
        theta = self.solve(self.weights(scorer_parameters))
        return float(reference.upper(self.model, self.named(theta), self.validation))


def engine_hypergradient(inner):
    """Equations (5) to (7) by the engine alone, at the solved lower level."""
    torch.nn.utils.vector_to_parameters(inner.theta, inner.model.parameters())
    P = global_softmax(hypergradient.score_batch(inner.scorer, inner.batch))
    b = curvature.gradient(inner.model, validation_loss(inner.validation, dtype=torch.float64)).gradient.flat
    G = lower_loss(inner.batch, P, **inner.options)
    d = curvature.curvature_product(inner.model, G, inner.inverse @ b).influence
    coefficients = hypergradient.hypergradient_coefficients(P, d)
    return hypergradient.hypergradient(inner.scorer, inner.batch, coefficients).flat


def derivative(phi, direction, scorer, step=0.004, levels=3):
    """d Phi / d direction by central differences, Richardson-extrapolated: error O(step^(2 levels))."""
    start = {n: p.detach().clone() for n, p in scorer.named_parameters()}

    def at(t):
        parts = direction.split([p.numel() for p in start.values()])
        return phi({n: p + t * part.view_as(p) for (n, p), part in zip(start.items(), parts, strict=True)})

    row = [(at(step / 2**i) - at(-step / 2**i)) / (2 * step / 2**i) for i in range(levels)]
    for order in range(1, levels):
        row = [(4**order * row[i + 1] - row[i]) / (4**order - 1) for i in range(len(row) - 1)]
    return row[0]


def test_equals_finite_differences_of_phi_through_the_solved_lower_level():
    inner = Inner()
    found = engine_hypergradient(inner)
    across = torch.randn(len(found), generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    direction = found / found.norm() + across / across.norm()
    expected = derivative(inner.phi, direction, inner.scorer)
    assert abs(float(found @ direction) - expected) < 1e-9 * abs(expected)
