"""The output matrix fused with cross-entropy and KL: value, gradient and tangents, chunked over labelled positions.

For one labelled position with last hidden state h, output matrix W, logits x = W h, p = softmax(x), label y and the
teacher's distribution t, the loss is  a · CE + k · KL  with coefficients a, k; m = a + k, alpha = a / m, kappa = k / m.
Gradient by the logits, g = m g₀, and its tangent along (ḣ, Ẇ), m ġ₀, with ẋ = W ḣ + Ẇ h and s = <p, ẋ>:

    CE and KL(target || proxy) (a soft label)   g₀ = p - alpha y - kappa t       ġ₀ = p (ẋ - s)
    CE and KL(proxy || target)                  g₀ = alpha (p - y) + kappa F     ġ₀ = (p + kappa F) (ẋ - s) - kappa K̇ p
        where E = log p - log t - KL,  F = p E,  K̇ = <F, ẋ>, the tangent of KL

Gauss-Newton's middle matrix is m (diag p - p pᵀ) in every case: times ẋ, that is m p (ẋ - s).
A chunk of positions is made, used and dropped: no tensor over all positions and the vocabulary exists. Under bf16 the
products are bf16 with fp32 accumulation and everything else is fp32.

Shapes: N labelled positions, R those of a chunk, w hidden size, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
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

    The adjoint is [N, w], or [2, N, w] as [its tangent (or the Gauss-Newton cotangent), adjoint]; None if not made.
    """

    cross_entropy: Tensor
    kl: Tensor
    tangent: Tensor | None
    adjoint: Tensor | None


def evaluate_head(hidden: Tensor, weight: Tensor, terms: Terms) -> HeadResult:
    """Cross-entropy and KL of hidden states [N, w] under the output matrix [v, w]; forward only."""
    chunks = _Chunks(hidden, weight, terms)
    losses = [chunks.load(rows, hidden[rows]) for rows in chunks]
    return chunks.result([loss.cross_entropy for loss in losses], [loss.kl for loss in losses])


def head_gradient(hidden: Tensor, weight: Tensor, terms: Terms, weight_gradient: Tensor) -> HeadResult:
    """Losses and adjoint of hidden states [N, w]; the output matrix's gradient is added to ``weight_gradient``."""
    chunks = _Chunks(hidden, weight, terms)
    adjoint = torch.empty_like(hidden)
    entropy, kl = [], []
    for rows in chunks:
        loss = chunks.load(rows, hidden[rows])
        entropy.append(loss.cross_entropy)
        kl.append(loss.kl)
        gradient = chunks.gradient(loss).to(weight.dtype)
        mass = loss.mass.to(weight.dtype)
        torch.mul(gradient @ weight, mass, out=adjoint[rows])
        add_product(weight_gradient, gradient.t(), hidden[rows] * mass)
    return chunks.result(entropy, kl, adjoint=adjoint)


def head_tangent(hidden: Tensor, weight: Tensor, weight_tangent: Tensor, terms: Terms) -> HeadResult:
    """Losses and the tangent of the cross-entropy of dual hidden states [2, N, w]; forward only."""
    chunks = _Chunks(hidden[0], weight, terms)
    entropy, kl, tangents = [], [], []
    for rows in chunks:
        loss = chunks.load(rows, hidden[0, rows])
        logits = chunks.load_tangent(loss, hidden[:, rows], weight_tangent)
        at_label = logits.gather(1, loss.labels).squeeze(1)
        entropy.append(loss.cross_entropy)
        kl.append(loss.kl)
        tangents.append(logits.mul_(loss.probabilities).sum(1) - at_label)
    return chunks.result(entropy, kl, tangents)


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
    chunks = _Chunks(hidden[0], weight, terms)
    adjoint = torch.empty_like(hidden)
    entropy, kl, tangents = [], [], []
    for rows in chunks:
        loss = chunks.load(rows, hidden[0, rows])
        logits = chunks.load_tangent(loss, hidden[:, rows], weight_tangent)
        tangents.append(chunks.curvature(loss, logits, gauss_newton))
        entropy.append(loss.cross_entropy)
        kl.append(loss.kl)
        chunks.gradient(loss)
        pair, mass = chunks.pair(loss).to(weight.dtype), loss.mass.to(weight.dtype)
        gradient, change = pair[0], pair[1]
        back = (pair.flatten(0, 1) @ weight).view(2, len(mass), -1)
        if not gauss_newton:
            back[1].addmm_(gradient, weight_tangent)
        torch.mul(back.flip(0), mass, out=adjoint[:, rows])
        scaled = hidden[:, rows] * mass
        add_product(weight_gradient, gradient.t(), scaled[0])
        if gauss_newton:
            add_product(weight_product, change.t(), scaled[0])
        else:
            add_product(weight_product, pair.flatten(0, 1).t(), scaled.flip(0).flatten(0, 1))
    return chunks.result(entropy, kl, tangents, adjoint)


class _Loss(NamedTuple):
    """One chunk's scalars per position and its two buffers [R, v]."""

    cross_entropy: Tensor
    kl: Tensor
    labels: Tensor
    probabilities: Tensor
    teacher: Tensor | None
    """t for KL(target || proxy), F for KL(proxy || target)."""
    mass: Tensor
    alpha: Tensor
    kappa: Tensor


class _Chunks:
    """Slices of the labelled positions, and the buffers that all of them share.

    Buffers are allocated once: a fresh tensor of this size is fresh pages from the system every time.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, terms: Terms):
        self.weight, self.terms, self.count = weight, terms, len(hidden)
        self.size = chunk_size(self.count, len(weight), hidden.device)
        dtype = accumulation_dtype(hidden.dtype)
        self.number = 2 + (terms.teacher is not None) * (1 + (terms.kl_direction == "proxy_to_target"))
        self.memory = torch.empty(self.number * self.size * len(weight), dtype=dtype, device=hidden.device)
        mass = (terms.cross_entropy + terms.divergence).to(dtype) if terms.teacher else terms.cross_entropy.to(dtype)
        self.mass = mass.unsqueeze(1)
        share = (terms.divergence.to(dtype) / mass) if terms.teacher else torch.zeros_like(mass)
        self.kappa = torch.where(mass > 0, share, torch.zeros_like(mass)).unsqueeze(1)

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, self.count, self.size):
            yield slice(start, min(start + self.size, self.count))

    def buffer(self, index: int, rows: int) -> Tensor:
        """Buffer ``index`` as [rows, v]; 0 and 1 are adjacent."""
        size = rows * len(self.weight)
        return self.memory[index * size : (index + 1) * size].view(rows, -1)

    def load(self, rows: slice, hidden: Tensor) -> _Loss:
        """Losses, probabilities (buffer 0) and the teacher's part (buffer 2); buffer 1 is free afterwards."""
        count = len(hidden)
        p, logits = self.buffer(0, count), self.buffer(1, count)
        _project(hidden, self.weight, logits)
        labels = self.terms.positions.labels[rows].unsqueeze(1)
        at_label = logits.gather(1, labels).squeeze(1)
        kl, teacher = torch.zeros_like(at_label), None
        if self.terms.teacher is None:
            normaliser = self.terms.kernels.log_softmax_sums(logits, p)
        elif self.terms.kl_direction == "target_to_proxy":
            kl, teacher, normaliser = self._target_to_proxy(rows, p, logits)
        else:
            kl, teacher, normaliser = self._proxy_to_target(rows, p, logits)
        kappa = self.kappa[rows]
        return _Loss(normaliser - at_label, kl, labels, p, teacher, self.mass[rows], 1.0 - kappa, kappa)

    def _target_to_proxy(self, rows: slice, p: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        teacher = self._teacher_logits(rows)
        teacher_normaliser = self.terms.kernels.log_softmax_sums(teacher, p)
        mean = teacher.sub_(logits).mul_(p).sum(1)
        teacher.copy_(p)
        normaliser = self.terms.kernels.log_softmax_sums(logits, p)
        return mean + normaliser - teacher_normaliser, teacher, normaliser

    def _proxy_to_target(self, rows: slice, p: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        teacher = self._teacher_logits(rows)
        teacher_normaliser = self.terms.kernels.log_softmax_sums(teacher, p)
        normaliser = self.terms.kernels.log_softmax_sums(logits, p)
        difference = torch.sub(logits, teacher, out=teacher)
        mean = torch.mul(p, difference, out=logits).sum(1)
        difference.sub_(mean.unsqueeze(1)).mul_(p)
        return mean - normaliser + teacher_normaliser, difference, normaliser

    def _teacher_logits(self, rows: slice) -> Tensor:
        samples, columns, _ = self.terms.positions
        hidden = self.terms.teacher.hidden_states[samples[rows], columns[rows]]
        out = self.buffer(2, len(hidden))
        _project(hidden, self.terms.teacher.output_weight, out)
        return out

    def load_tangent(self, loss: _Loss, hidden: Tensor, weight_tangent: Tensor) -> Tensor:
        """ẋ = W ḣ + Ẇ h of dual hidden states [2, R, w], in buffer 1."""
        logits = self.buffer(1, len(loss.mass))
        _project(hidden[1], self.weight, logits)
        add_product(logits, hidden[0], weight_tangent.t())
        return logits

    def curvature(self, loss: _Loss, logits: Tensor, gauss_newton: bool) -> Tensor:
        """Turn ẋ (buffer 1) into ġ₀, or into p (ẋ - s) for Gauss-Newton; returns the tangent of the cross-entropy."""
        p, f = loss.probabilities, loss.teacher
        at_label = logits.gather(1, loss.labels).squeeze(1)
        second_order = f is not None and not gauss_newton and self.terms.kl_direction == "proxy_to_target"
        scratch = torch.mul(f, logits, out=self.buffer(3, len(p))) if second_order else None
        mean = self.terms.kernels.centre(logits, p)
        if second_order:
            kl_tangent = scratch.sum(1, keepdim=True)
            scratch.addcmul_(f, mean.unsqueeze(1), value=-1).addcmul_(p, kl_tangent, value=-1)
            logits.addcmul_(scratch, loss.kappa)
        return mean - at_label

    def gradient(self, loss: _Loss) -> Tensor:
        """Turn p (buffer 0) into g₀."""
        p = loss.probabilities
        if loss.teacher is not None:
            if self.terms.kl_direction == "target_to_proxy":
                p.addcmul_(loss.teacher, loss.kappa, value=-1)
            else:
                p.mul_(loss.alpha).addcmul_(loss.teacher, loss.kappa)
        return p.scatter_(1, loss.labels, p.gather(1, loss.labels) - loss.alpha)

    def pair(self, loss: _Loss) -> Tensor:
        """Buffers 0 and 1 as one tensor [2, R, v]."""
        rows = len(loss.mass)
        return self.memory[: 2 * rows * len(self.weight)].view(2, rows, -1)

    def result(self, entropy: list, kl: list, tangents: list | None = None, adjoint: Tensor | None = None):
        """Chunks put together."""
        empty = self.memory.new_zeros(0)
        entropy, kl = torch.cat([empty, *entropy]), torch.cat([empty, *kl])
        return HeadResult(entropy, kl, None if tangents is None else torch.cat([empty, *tangents]), adjoint)


def chunk_size(count: int, vocab_size: int, device: torch.device) -> int:
    """Positions per chunk: as many as the budget allows, and at most an eighth of all (but no fewer than 16)."""
    budget = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"]) // vocab_size
    size = min(max(budget, 16), max(-(-count // 8), 16))
    return max(1, min(-(-size // 8) * 8, count))


def _project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = hidden weightᵀ."""
    if out.dtype == hidden.dtype == weight.dtype:
        torch.mm(hidden, weight.t(), out=out)
    else:
        out.copy_(hidden @ weight.t())
