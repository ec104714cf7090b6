"""The two objectives as records: their coefficients are what autograd finds, and what is wrong is refused."""

import pytest
import torch

from megatron_bliss.bilevel.objective import Loss, Objective, validation_loss
from tests.bilevel.problems import lower_loss, random_batch, random_teacher, random_weights


def test_coefficients_are_the_derivatives_of_g_by_each_tokens_losses():
    """Autograd on G as a function of every labelled token's cross-entropy and KL finds the same."""
    batch, P = random_batch(4, 9), random_weights(4)
    samples = batch.label_mask[:, 1:].nonzero(as_tuple=True)[0]
    lengths = batch.label_mask[:, 1:].sum(1)
    cross_entropy, kl = (torch.rand(len(samples), dtype=torch.float64).requires_grad_() for _ in range(2))
    means = [torch.zeros(4, dtype=torch.float64).index_add(0, samples, x) / lengths for x in (cross_entropy, kl)]
    G = Objective(kl_weight=0.3, num_samples=11)
    a, k = torch.autograd.grad(G.data_terms(P, means[0], G.mean_kl(means[1])), (cross_entropy, kl))
    share = 1 / lengths.double()
    torch.testing.assert_close(a, G.cross_entropy_coefficients(P, share)[samples], rtol=1e-14, atol=0)
    torch.testing.assert_close(k, G.kl_coefficients(share)[samples], rtol=1e-14, atol=0)


def test_the_l2_terms_gradient_and_hessian_are_its_curvature_times_theta_and_z():
    G, theta, z = Objective(l2_weight=0.7), torch.randn(5, dtype=torch.float64).requires_grad_(), torch.ones(5).double()
    (gradient,) = torch.autograd.grad(G.l2_term(theta), theta, create_graph=True)
    torch.testing.assert_close(gradient, G.l2_curvature * theta)
    torch.testing.assert_close(torch.autograd.grad(gradient @ z, theta)[0], G.l2_curvature * z)


def test_validation_weights_are_each_samples_share_of_the_labelled_tokens():
    batch = random_batch(5, 9)
    loss = validation_loss(batch, dtype=torch.float64)
    counts = batch.label_mask[:, 1:].sum(1)
    assert torch.equal(loss.weights, counts / counts.sum())
    assert loss.objective == Objective()
    batch.label_mask.zero_()
    assert not validation_loss(batch).weights.any()


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 9])
def test_micro_batches_are_the_whole_in_order(size):
    G = lower_loss(random_batch(5, 9), random_weights(5), teacher=random_teacher(5, 9), kl_weight=0.2)
    parts = list(G.micro_batches(size))
    assert all(len(part.batch) <= (size or 5) and part.objective is G.objective for part in parts)
    assert torch.equal(torch.cat([part.batch.tokens for part in parts]), G.batch.tokens)
    assert torch.equal(torch.cat([part.batch.unit_ids for part in parts]), G.batch.unit_ids)
    assert torch.equal(torch.cat([part.weights for part in parts]), G.weights)
    assert torch.equal(torch.cat([part.teacher.hidden_states for part in parts]), G.teacher.hidden_states)
    assert list(Loss(Objective(), G.batch.slice(0, 0), G.weights[:0]).micro_batches(size)) == []


def test_errors_say_what_to_change():
    batch, P = random_batch(3, 9), random_weights(3)
    with pytest.raises(ValueError, match="kl_direction 'both'.*change bilevel.kl_direction"):
        Objective(kl_direction="both")
    with pytest.raises(ValueError, match="num_samples 0 with kl_weight 0.1, expected the samples of the global batch"):
        Objective(kl_weight=0.1)
    with pytest.raises(ValueError, match="without a teacher"):
        lower_loss(batch, P, kl_weight=0.1)
    with pytest.raises(ValueError, match="one a sample"):
        lower_loss(batch, P[:2])
