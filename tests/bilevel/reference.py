"""Equations (1) to (7) of BLISS the naive way: whole graphs, double backward, per-sample gradients. For tests alone.

Nothing of the engine is used but ``model(tokens) -> logits`` and ``score_model(tokens, lengths) -> scores``. Vectors
are flat, in the order of ``named_parameters``.
"""

import torch
from torch.func import functional_call, jvp
from torch.nn.utils import parameters_to_vector


def weights(scores):
    """(2) P_i over the global batch."""
    return torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()


WEIGHTS = {
    "softmax": lambda model, batch: weights(model(batch.tokens, batch.lengths)),
    "softmax_raw": lambda model, batch: weights(model.raw_scores(batch.tokens, batch.lengths)),
    "sigmoid": lambda model, batch: 1 / (1 + torch.exp(-model.raw_scores(batch.tokens, batch.lengths))) / len(batch),
    "raw": lambda model, batch: model.raw_scores(batch.tokens, batch.lengths) / len(batch),
}
"""(2) by the names of bilevel.weights, of a score model and the global batch, to be differentiated through."""


def losses(model, parameters, batch, teacher=None, kl_direction="proxy_to_target"):
    """l_i and KL_i: means over the labelled tokens of a sample."""
    log_p = functional_call(model, parameters, (batch.tokens,)).log_softmax(-1)[:, :-1]
    mask = batch.label_mask[:, 1:].to(log_p.dtype)
    mean = lambda x: (x * mask).sum(1) / mask.sum(1).clamp(min=1)  # noqa: E731
    cross_entropy = mean(-log_p.gather(-1, batch.tokens[:, 1:, None]).squeeze(-1))
    if teacher is None:
        return cross_entropy, torch.zeros_like(cross_entropy)
    log_t = (teacher.hidden_states @ teacher.output_weight.T).log_softmax(-1)[:, :-1]
    if kl_direction == "proxy_to_target":
        return cross_entropy, mean((log_p.exp() * (log_p - log_t)).sum(-1))
    return cross_entropy, mean((log_t.exp() * (log_t - log_p)).sum(-1))


def lower(model, parameters, batch, P, *, teacher=None, kl_weight=0.0, kl_direction="proxy_to_target", l2_weight=0.0):
    """(3) G = sum_i P_i l_i + gamma / n sum_i KL_i + lambda ||theta||²."""
    cross_entropy, kl = losses(model, parameters, batch, teacher, kl_direction)
    square = sum(p.square().sum() for p in parameters.values())
    return (P * cross_entropy).sum() + kl_weight * kl.mean() + l2_weight * square


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def gradient(model, batch, P, **options):
    parameters = dict(model.named_parameters())
    loss = lower(model, parameters, batch, P, **options)
    return loss.detach(), flat(torch.autograd.grad(loss, list(parameters.values())))


def hessian_product(model, batch, P, z, **options):
    parameters = dict(model.named_parameters())
    loss = lower(model, parameters, batch, P, **options)
    first = flat(torch.autograd.grad(loss, list(parameters.values()), create_graph=True))
    return flat(torch.autograd.grad(first @ z, list(parameters.values()), materialize_grads=True))


def gauss_newton_product(model, batch, P, z, *, teacher=None, kl_weight=0.0, kl_direction=None, l2_weight=0.0):
    """Jᵀ M J z + 2 lambda z with M = m (diag p - p pᵀ), m the mass of cross-entropy and KL at a position."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    run = lambda *values: functional_call(model, dict(zip(names, values, strict=True)), (batch.tokens,))  # noqa: E731
    sizes = [p.numel() for p in parameters]
    direction = tuple(t.view_as(p) for t, p in zip(z.split(sizes), parameters, strict=True))
    tangent = jvp(run, tuple(p.detach() for p in parameters), direction)[1]
    logits = run(*parameters)
    p = logits.detach().softmax(-1)
    mask = torch.zeros_like(batch.label_mask, dtype=p.dtype)
    mask[:, :-1] = batch.label_mask[:, 1:]
    mass = (P + kl_weight / len(batch))[:, None] * mask / mask.sum(1, keepdim=True).clamp(min=1)
    image = mass[..., None] * p * (tangent - (p * tangent).sum(-1, keepdim=True))
    return flat(torch.autograd.grad(logits, parameters, image)) + 2 * l2_weight * z


def influences(model, batch, z):
    """(6) d_i = <grad l_i, z>, one gradient per sample."""
    parameters = dict(model.named_parameters())
    cross_entropy, _ = losses(model, parameters, batch)
    rows = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in cross_entropy]
    return torch.stack([flat(row) @ z for row in rows])


def upper(model, parameters, validation):
    """(4) Phi: mean cross-entropy over all labelled tokens."""
    counts = validation.label_mask[:, 1:].sum(1)
    return (losses(model, parameters, validation)[0] * counts).sum() / counts.sum()


def upper_gradient(model, validation):
    parameters = dict(model.named_parameters())
    return flat(torch.autograd.grad(upper(model, parameters, validation), list(parameters.values())))


def solution(model, batch, P, b, damping, **options):
    """(5) z with (H + delta I) z = b, by the dense Hessian."""
    columns = [hessian_product(model, batch, P, e, **options) for e in torch.eye(len(b), dtype=b.dtype)]
    return torch.linalg.solve(torch.stack(columns) + damping * torch.eye(len(b), dtype=b.dtype), b)


def hypergradient(score_model, batch, z, model):
    """(7) - sum_i P_i (d_i - sum_j P_j d_j) grad s_i, one gradient per sample."""
    scores = score_model(batch.tokens, batch.lengths)
    P, d = weights(scores).detach(), influences(model, batch, z)
    parameters = list(score_model.parameters())
    rows = [flat(torch.autograd.grad(score, parameters, retain_graph=True)) for score in scores]
    return -sum(P[i] * (d[i] - P @ d) * rows[i] for i in range(len(rows)))


def parameters_of(model):
    return parameters_to_vector(model.parameters()).detach()
