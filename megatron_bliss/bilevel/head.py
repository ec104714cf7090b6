"""The output matrix fused with cross-entropy and KL: value, gradient and tangents, chunked over labelled positions.

For one labelled position with last hidden state h, output matrix W, logits x = W h, p = softmax(x), label y and the
teacher's logits u and distribution t = softmax(u), the loss is  a · CE + k · KL  with coefficients a, k and

    CE = Z - x_y                                    Z = log Σ exp(x), Z_t = log Σ exp(u)
    KL(target || proxy) = <t, u - x> + Z - Z_t      KL(proxy || target) = <p, x - u> - Z + Z_t

With m = a + k, alpha = a / m and kappa = k / m, the gradient by the logits is g = m g₀, and its tangent along (ḣ, Ẇ) is
m ġ₀, with ẋ = W ḣ + Ẇ h and s = <p, ẋ> (so the tangent of CE is s - ẋ_y):

    CE and KL(target || proxy) (a soft label)   g₀ = p - alpha y - kappa t       ġ₀ = p (ẋ - s)
    CE and KL(proxy || target)                  g₀ = alpha (p - y) + kappa F     ġ₀ = (p + kappa F) (ẋ - s) - kappa K̇ p
        where E = log p - log t - KL,  F = p E,  K̇ = <F, ẋ>, the tangent of KL

Gauss-Newton's middle matrix is m (diag p - p pᵀ) in every case: times ẋ, that is m p (ẋ - s), and it takes ġ₀'s place.
Back through x = W h, sums over positions (Gauss-Newton drops what holds Ẇ or ḣ, where a gradient meets a tangent):

    h̄ = m Wᵀ g₀, its tangent m (Wᵀ ġ₀ + Ẇᵀ g₀)      W̄ = Σ m g₀ hᵀ, its tangent Σ m (ġ₀ hᵀ + g₀ ḣᵀ)

A chunk of positions is made, used and dropped: no tensor over all positions and the vocabulary exists. Under bf16 the
products are bf16 with fp32 accumulation and everything else is fp32.

Shapes: N labelled positions, R those of a chunk, w hidden size, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from megatron_bliss.bilevel.kernels import EAGER, Kernels
from megatron_bliss.bilevel.vector import accumulation_dtype, add_product
from megatron_bliss.config.bilevel import KlDirection

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
KL_DIRECTIONS = get_args(KlDirection)


class Teacher(NamedTuple):
    """The frozen target on the same batch: last hidden states [b, s, w_t] and output matrix [v, w_t]."""

    hidden_states: Tensor
    output_weight: Tensor

    def slice(self, start: int, stop: int) -> Teacher:
        """The same for samples ``start`` to ``stop``."""
        return Teacher(self.hidden_states[start:stop], self.output_weight)


class Positions(NamedTuple):
    """Labelled positions of a batch: hidden state (sample, column) predicts ``labels``; all int64 [N]."""

    samples: Tensor
    columns: Tensor
    labels: Tensor


class Terms(NamedTuple):
    """What the loss of every labelled position is made of."""

    positions: Positions
    cross_entropy: Tensor
    """Coefficients a [N]."""
    divergence: Tensor
    """Coefficients k [N] of the KL; not used without a teacher."""
    teacher: Teacher | None
    kl_direction: str
    kernels: Kernels = EAGER


class HeadResult(NamedTuple):
    """Per labelled position: cross-entropy [N], KL [N], tangent of the cross-entropy [N], adjoint of the hidden state.

    The adjoint is [N, w], or [2, N, w] as [its tangent (or the Gauss-Newton cotangent), adjoint] where there is a
    tangent.
    """

    cross_entropy: Tensor
    kl: Tensor
    tangent: Tensor | None
    adjoint: Tensor


def head_gradient(hidden: Tensor, weight: Tensor, terms: Terms, weight_gradient: Tensor) -> HeadResult:
    """Losses and adjoint of hidden states [N, w]; the output matrix's gradient is added to ``weight_gradient``."""
    head = _Head(weight, None, terms, gauss_newton=False)
    differentiate = _loss_function(terms)
    adjoint, losses = torch.empty_like(hidden), []
    for chunk in _chunks(hidden.unsqueeze(0), head):
        losses.append(differentiate(chunk, head))
        g = chunk.buffers[0].to(weight.dtype)  # g₀ [R, v]
        m = chunk.mass.to(weight.dtype)  # [R, 1]; it scales what is w wide, never what is v wide
        torch.mul(g @ weight, m, out=adjoint[chunk.rows])  # h̄ [R, w]
        add_product(weight_gradient, g.t(), chunk.hidden[0] * m)  # W̄ [v, w]
    return _result(losses, adjoint)


def head_losses(hidden: Tensor, weight: Tensor, terms: Terms) -> Tensor:
    """Cross-entropies [N] of hidden states [N, w] alone: the numbers that ``head_gradient`` gives."""
    head, differentiate = _Head(weight, None, terms, gauss_newton=False), _loss_function(terms)
    losses = [differentiate(chunk, head) for chunk in _chunks(hidden.unsqueeze(0), head)]
    return _result(losses, hidden).cross_entropy


def head_curvature(
    hidden: Tensor,
    weight: Tensor,
    weight_tangent: Tensor,
    terms: Terms,
    weight_gradient: Tensor,
    weight_product: Tensor,
    *,
    gauss_newton: bool,
) -> HeadResult:
    """Everything at dual hidden states [2, N, w] along the output matrix's tangent [v, w].

    Adds the output matrix's gradient and its part of the Hessian (or Gauss-Newton) product to the last two tensors.
    """
    head = _Head(weight, weight_tangent, terms, gauss_newton)
    differentiate = _loss_function(terms)
    adjoint, losses = torch.empty_like(hidden), []
    for chunk in _chunks(hidden, head):
        losses.append(differentiate(chunk, head))
        pair = chunk.buffers[:2].to(weight.dtype)  # g₀ and ġ₀ [2, R, v], side by side: one product serves both
        m = chunk.mass.to(weight.dtype)  # [R, 1]
        g, g_tangent = pair[0], pair[1]
        back = (pair.flatten(0, 1) @ weight).view(2, len(m), -1)  # Wᵀ g₀ and Wᵀ ġ₀ [2, R, w]
        if not gauss_newton:
            back[1].addmm_(g, weight_tangent)  # + Ẇᵀ g₀
        torch.mul(back.flip(0), m, out=adjoint[:, chunk.rows])  # [tangent of h̄, h̄]
        scaled = chunk.hidden * m  # m h and m ḣ [2, R, w]
        add_product(weight_gradient, g.t(), scaled[0])  # W̄
        if gauss_newton:
            add_product(weight_product, g_tangent.t(), scaled[0])  # Σ m p (ẋ - s) hᵀ
        else:
            # g₀ meets ḣ and ġ₀ meets h, hence the flip; one product over 2 R rows adds both up.
            add_product(weight_product, pair.flatten(0, 1).t(), scaled.flip(0).flatten(0, 1))
    return _result(losses, adjoint)


class _Head(NamedTuple):
    """What is the same for all chunks."""

    weight: Tensor
    """W [v, w]."""
    weight_tangent: Tensor | None
    """Ẇ [v, w]; None: gradients only."""
    terms: Terms
    gauss_newton: bool


class _Chunk(NamedTuple):
    """R labelled positions, ``rows`` of all, and the memory to work in."""

    rows: slice
    hidden: Tensor
    """h, and ḣ for tangents [1 or 2, R, w]."""
    labels: Tensor
    """y [R, 1]."""
    mass: Tensor
    """m [R, 1]."""
    kappa: Tensor
    """[R, 1]; alpha is 1 - kappa."""
    buffers: Tensor
    """[2 to 4, R, v]: a loss function leaves g₀ in the first and ġ₀ (or p (ẋ - s)) in the second."""


class _Losses(NamedTuple):
    """Per position of a chunk [R]."""

    cross_entropy: Tensor
    kl: Tensor
    tangent: Tensor | None
    """Of the cross-entropy."""


def _loss_function(terms: Terms) -> Callable[[_Chunk, _Head], _Losses]:
    if terms.teacher is None:
        return _cross_entropy
    return {"target_to_proxy": _target_to_proxy, "proxy_to_target": _proxy_to_target}[terms.kl_direction]


# The three loss functions work in place. Tensors [R, v] are the largest there are: one more of them would add a quarter
# or more to the head's memory. So each is overwritten as soon as what it holds is used up; comments say what it holds.


def _cross_entropy(chunk: _Chunk, head: _Head) -> _Losses:
    """CE alone: g₀ = p - y, ġ₀ = p (ẋ - s)."""
    kernels, labels = head.terms.kernels, chunk.labels
    p, x = chunk.buffers  # [R, v] each
    _logits(chunk.hidden[0], head.weight, out=x)  # x = W h
    x_label = _at(x, labels)  # x_y [R]
    log_sum = kernels.log_softmax_sums(x, p)  # Z [R], and p
    tangent = None
    if head.weight_tangent is not None:
        x_tangent = _logits_tangent(chunk, head, out=x)  # ẋ in the place of x
        x_tangent_label = _at(x_tangent, labels)  # ẋ_y [R]
        s = kernels.centre(x_tangent, p)  # [R]; ẋ becomes p (ẋ - s) = ġ₀
        tangent = s - x_tangent_label
    _subtract_labels(p, labels, 1.0)  # g₀ = p - y
    return _Losses(log_sum - x_label, torch.zeros_like(x_label), tangent)


def _target_to_proxy(chunk: _Chunk, head: _Head) -> _Losses:
    """CE and KL(target || proxy): g₀ = p - alpha y - kappa t, ġ₀ = p (ẋ - s)."""
    kernels, labels = head.terms.kernels, chunk.labels
    p, x, t = chunk.buffers  # [R, v] each
    _logits(chunk.hidden[0], head.weight, out=x)  # x = W h
    x_label = _at(x, labels)  # x_y [R]
    u = _teacher_logits(chunk, head, out=t)
    teacher_log_sum = kernels.log_softmax_sums(u, p)  # Z_t [R]; t stands in p's buffer while u is needed in its own
    mean = u.sub_(x).mul_(p).sum(1)  # <t, u - x> [R]
    t.copy_(p)
    log_sum = kernels.log_softmax_sums(x, p)  # Z [R], and p
    kl = mean + log_sum - teacher_log_sum
    tangent = None
    if head.weight_tangent is not None:
        x_tangent = _logits_tangent(chunk, head, out=x)  # ẋ in the place of x
        x_tangent_label = _at(x_tangent, labels)  # ẋ_y [R]
        s = kernels.centre(x_tangent, p)  # [R]; ẋ becomes p (ẋ - s) = ġ₀: t is a constant
        tangent = s - x_tangent_label
    p.addcmul_(t, chunk.kappa, value=-1)
    _subtract_labels(p, labels, 1.0 - chunk.kappa)  # g₀ = p - kappa t - alpha y
    return _Losses(log_sum - x_label, kl, tangent)


def _proxy_to_target(chunk: _Chunk, head: _Head) -> _Losses:
    """CE and KL(proxy || target): g₀ = alpha (p - y) + kappa F, ġ₀ = (p + kappa F) (ẋ - s) - kappa K̇ p."""
    kernels, labels = head.terms.kernels, chunk.labels
    p, x, f = chunk.buffers[:3]  # [R, v] each
    _logits(chunk.hidden[0], head.weight, out=x)  # x = W h
    x_label = _at(x, labels)  # x_y [R]
    u = _teacher_logits(chunk, head, out=f)
    teacher_log_sum = kernels.log_softmax_sums(u, p)  # Z_t [R]; t itself is not needed
    log_sum = kernels.log_softmax_sums(x, p)  # Z [R], and p
    difference = torch.sub(x, u, out=f)
    mean = torch.mul(p, difference, out=x).sum(1)  # <p, x - u> [R]; x is used up
    kl = mean - log_sum + teacher_log_sum
    difference.sub_(mean.unsqueeze(1)).mul_(p)  # f is F now: E = x - u - <p, x - u>, as Z and Z_t cancel
    tangent = None
    if head.weight_tangent is not None:
        x_tangent = _logits_tangent(chunk, head, out=x)  # ẋ
        x_tangent_label = _at(x_tangent, labels)  # ẋ_y [R]
        if head.gauss_newton:
            s = kernels.centre(x_tangent, p)  # [R]; ẋ becomes p (ẋ - s)
        else:
            extra = torch.mul(f, x_tangent, out=chunk.buffers[3])  # F ẋ, while there is ẋ
            s = kernels.centre(x_tangent, p)  # [R]; ẋ becomes p (ẋ - s)
            kl_tangent = extra.sum(1, keepdim=True)  # K̇ [R, 1]
            extra.addcmul_(f, s.unsqueeze(1), value=-1).addcmul_(p, kl_tangent, value=-1)  # F (ẋ - s) - K̇ p
            x_tangent.addcmul_(extra, chunk.kappa)  # ġ₀ = p (ẋ - s) + kappa (F (ẋ - s) - K̇ p)
        tangent = s - x_tangent_label
    alpha = 1.0 - chunk.kappa
    p.mul_(alpha).addcmul_(f, chunk.kappa)
    _subtract_labels(p, labels, alpha)  # g₀ = alpha p + kappa F - alpha y
    return _Losses(log_sum - x_label, kl, tangent)


def _logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = hidden Wᵀ [R, v]."""
    if out.dtype == hidden.dtype == weight.dtype:
        torch.mm(hidden, weight.t(), out=out)
    else:
        out.copy_(hidden @ weight.t())


def _logits_tangent(chunk: _Chunk, head: _Head, out: Tensor) -> Tensor:
    """ẋ = W ḣ + Ẇ h [R, v]."""
    value, tangent = chunk.hidden
    _logits(tangent, head.weight, out)
    add_product(out, value, head.weight_tangent.t())
    return out


def _teacher_logits(chunk: _Chunk, head: _Head, out: Tensor) -> Tensor:
    """u [R, v], from the target's own hidden states: its logits over all positions would not fit."""
    (samples, columns, _), teacher = head.terms.positions, head.terms.teacher
    hidden = teacher.hidden_states[samples[chunk.rows], columns[chunk.rows]]  # [R, w_t]
    _logits(hidden, teacher.output_weight, out)
    return out


def _at(x: Tensor, labels: Tensor) -> Tensor:
    """The element of x [R, v] at each label: [R]."""
    return x.gather(1, labels).squeeze(1)


def _subtract_labels(p: Tensor, labels: Tensor, alpha: Tensor | float) -> None:
    """p -= alpha y, y one-hot [R, v] that is never made."""
    p.scatter_(1, labels, p.gather(1, labels) - alpha)


def _chunks(hidden: Tensor, head: _Head) -> Iterator[_Chunk]:
    """All positions of hidden [1 or 2, N, w], a chunk at a time; every chunk works in the same memory."""
    count, vocab_size, terms = hidden.shape[1], len(head.weight), head.terms
    size, dtype = chunk_size(count, vocab_size, hidden.device), accumulation_dtype(hidden.dtype)
    mass, kappa = _mass(terms, dtype)
    labels = terms.positions.labels.unsqueeze(1)  # [N, 1]
    number = _buffer_count(head)
    # Allocated once: a fresh tensor of this size is fresh pages from the system every time. Flat, because the last
    # chunk may be smaller, and its first two buffers must be adjacent, too.
    memory = torch.empty(number * size * vocab_size, dtype=dtype, device=hidden.device)
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        length = rows.stop - rows.start
        buffers = memory[: number * length * vocab_size].view(number, length, vocab_size)
        yield _Chunk(rows, hidden[:, rows], labels[rows], mass[rows], kappa[rows], buffers)


def _mass(terms: Terms, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """m and kappa [N, 1]; a position of mass 0 has kappa 0, so that it adds 0 to every sum and not 0 / 0."""
    if terms.teacher is None:
        mass = terms.cross_entropy.to(dtype)
        return mass.unsqueeze(1), torch.zeros_like(mass).unsqueeze(1)
    mass, divergence = (terms.cross_entropy + terms.divergence).to(dtype), terms.divergence.to(dtype)
    # a negative weight may cancel the KL's: a mass of one rounding keeps m kappa and m alpha, what the two are apart
    cancelled = (mass == 0) & (divergence != 0)
    mass = torch.where(cancelled, divergence * torch.finfo(dtype).eps, mass)
    return mass.unsqueeze(1), torch.where(mass != 0, divergence / mass, torch.zeros_like(mass)).unsqueeze(1)


def _buffer_count(head: _Head) -> int:
    """p and x; t or F; and one more for the second derivative of KL(proxy || target)."""
    if head.terms.teacher is None:
        return 2
    second_order = head.weight_tangent is not None and not head.gauss_newton
    return 4 if second_order and head.terms.kl_direction == "proxy_to_target" else 3


def chunk_size(count: int, vocab_size: int, device: torch.device) -> int:
    """Positions per chunk: as many as the budget allows, and at most an eighth of all (but no fewer than 16)."""
    budget = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"]) // vocab_size
    size = min(max(budget, 16), max(-(-count // 8), 16))
    return max(1, min(-(-size // 8) * 8, count))


def _result(losses: list[_Losses], adjoint: Tensor) -> HeadResult:
    """Chunks put together; empty where no position is labelled."""
    empty = adjoint.new_zeros(0, dtype=accumulation_dtype(adjoint.dtype))
    entropy = torch.cat([empty, *(part.cross_entropy for part in losses)])
    kl = torch.cat([empty, *(part.kl for part in losses)])
    tangent = torch.cat([empty, *(part.tangent for part in losses)]) if adjoint.ndim == 3 else None
    return HeadResult(entropy, kl, tangent, adjoint)
