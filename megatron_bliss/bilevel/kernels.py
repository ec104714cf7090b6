"""The element-wise work between the matrix products of a walk, as pure functions of tensors: eager or compiled.

Dual stacks hold [value, tangent] going forward and [tangent of the adjoint, adjoint] going back (dual.py): X = [x, ẋ]
and [dx̄, x̄], x̄ the adjoint of x and dx̄ its tangent. ``coupled`` false drops the terms in which an adjoint meets a
tangent (Gauss-Newton). Operands may be bf16; sums are fp32.

Each function is a dozen passes over memory as it stands and one or two when ``torch.compile`` has fused it: that is
what ``bilevel.compile`` does. Matrix products stay what they are. Until then memory is what they cost, so intermediate
tensors are overwritten once they are used up; nothing that a caller passes is, unless the function says so.

Shapes: w hidden size, o channels of the gated unit; ``...`` stands for batch and sequence, or for rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_bliss.bilevel.vector import accumulation_dtype


class NormSaved(NamedTuple):
    """What ``norm`` keeps for the way back: u and u̇ [..., w], rho and mean(u ẋ) [..., 1]; in the precision of sums."""

    unit: Tensor
    unit_tangent: Tensor
    rho: Tensor
    along: Tensor


class NormSums(NamedTuple):
    """What one normalisation adds to gradient and product: of its weight [w] and, where it has one, of its bias [w]."""

    weight_gradient: Tensor
    weight_product: Tensor
    bias_gradient: Tensor
    bias_product: Tensor


def norm(
    x: Tensor,
    weight: Tensor,
    weight_tangent: Tensor,
    bias: Tensor | None,
    bias_tangent: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, NormSaved]:
    """y = u w + c with u = rho (x - mean x), rho = (mean (x - mean x)² + eps)^-1/2; no bias: RMSNorm, no mean and no c.

    The Jacobian of u is rho P with the symmetric P(v) = v - mean v - u mean(u v), so u̇ = rho P(ẋ), and the tangent of
    rho is -rho² mean(u ẋ). Returns Y [2, ..., w] of X [2, ..., w], and what the way back needs.
    """
    precise = x.to(accumulation_dtype(x.dtype))  # [2, ..., w]
    value, tangent = precise[0], precise[1]
    if bias is not None:
        unit, _, rho = torch.native_layer_norm(value, value.shape[-1:], None, None, epsilon)  # F.layer_norm hides rho
    else:
        rho = torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + epsilon)  # [..., 1]
        unit = value * rho
    along = (unit * tangent).mean(-1, keepdim=True)  # mean(u ẋ) [..., 1]
    unit_tangent = _project(tangent, unit, along, bias is not None).mul_(rho)
    out = torch.stack((unit * weight, unit_tangent * weight))  # [2, ..., w]
    out[1].addcmul_(unit, weight_tangent)  # ẏ = u̇ w + u ẇ + ċ
    if bias is not None:
        out[0].add_(bias)
        out[1].add_(bias_tangent)
    return out.to(x.dtype), NormSaved(unit, unit_tangent, rho, along)


def norm_backward(
    adjoint: Tensor, saved: NormSaved, weight: Tensor, weight_tangent: Tensor, centred: bool, coupled: bool
) -> tuple[Tensor, NormSums]:
    """The adjoint of ``norm``'s input, and what it adds to gradient and product; ``centred`` for LayerNorm.

    x̄ = rho P(ū) with ū = ȳ w. P moves with u, and rho with x, so with dū = dȳ w + ȳ ẇ the tangent of x̄ is
    dx̄ = rho (P(dū) - u̇ mean(u ū) - u mean(u̇ ū) - rho mean(u ẋ) P(ū)).
    """
    adjoint = adjoint.to(saved.unit.dtype)
    unit, unit_tangent, rho, along = saved
    y_dot, y_bar = adjoint[0], adjoint[1]  # dȳ and ȳ [..., w]
    bar, dot = y_bar * weight, y_dot * weight  # ū and, but for ȳ ẇ, dū
    bar_along = (bar * unit).mean(-1, keepdim=True)  # [..., 1]
    out = torch.empty_like(adjoint)
    projected = _project(bar, unit, bar_along, centred)  # P(ū)
    torch.mul(projected, rho, out=out[1])
    if coupled:
        dot.addcmul_(y_bar, weight_tangent)
        dot_along = (dot * unit).add_(bar * unit_tangent).mean(-1, keepdim=True)  # mean(u dū) + mean(u̇ ū)
        change = _project(dot, unit, dot_along, centred).addcmul_(unit_tangent, bar_along, value=-1)
        torch.mul(change.addcmul_(projected, along * rho, value=-1), rho, out=out[0])
    else:
        dot_along = (dot * unit).mean(-1, keepdim=True)
        torch.mul(_project(dot, unit, dot_along, centred), rho, out=out[0])
    return out.to(weight.dtype), _norm_sums(y_dot, y_bar, saved, coupled)


def _norm_sums(y_dot: Tensor, y_bar: Tensor, saved: NormSaved, coupled: bool) -> NormSums:
    """w̄ = Σ ȳ u and c̄ = Σ ȳ over all rows, and their tangents Σ (dȳ u + ȳ u̇) and Σ dȳ."""
    rows = tuple(range(y_bar.ndim - 1))
    change = y_dot * saved.unit
    if coupled:
        change.addcmul_(y_bar, saved.unit_tangent)
    return NormSums((y_bar * saved.unit).sum(rows), change.sum(rows), y_bar.sum(rows), y_dot.sum(rows))


def _project(v: Tensor, unit: Tensor, along: Tensor, centred: bool) -> Tensor:
    """P(v) = v - mean v - u along, a new tensor, for along = mean(u v); without the mean for RMSNorm."""
    v = v - v.mean(-1, keepdim=True) if centred else v.clone()
    return v.addcmul_(unit, along, value=-1)


def gelu(x: Tensor, coupled: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """y = x Φ(x): y' = Φ + x φ, y'' = (2 - x²) φ, with Φ and φ the normal distribution function and its density.

    Returns Y and what the way back needs: y' and, coupled, y'' ẋ, made here because the one costly erf is here.
    """
    precise = x.to(accumulation_dtype(x.dtype))  # [2, ...]
    value, tangent = precise[0], precise[1]
    distribution = torch.erf(value * math.sqrt(0.5)).add_(1.0).mul_(0.5)  # Φ
    square = value * value
    density = torch.exp(square * -0.5).mul_(1.0 / math.sqrt(2.0 * math.pi))  # φ
    out = torch.empty_like(precise)
    torch.mul(value, distribution, out=out[0])
    first = distribution.addcmul_(value, density)  # y', in Φ's memory: Φ is used up
    torch.mul(first, tangent, out=out[1])  # ẏ = y' ẋ
    second = square.neg_().add_(2.0).mul_(density).mul_(tangent) if coupled else None
    return out.to(x.dtype), first, second


def gelu_backward(adjoint: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
    """The adjoint of ``gelu``'s input: x̄ = ȳ y', dx̄ = dȳ y' + ȳ y'' ẋ."""
    out = adjoint * first
    if second is not None:
        out[0].addcmul_(adjoint[1], second)
    return out.to(adjoint.dtype)


class SwigluSaved(NamedTuple):
    """What ``swiglu`` keeps for the way back, in the precision of sums: X [2, ..., 2 o]; sigma, f and f' [..., o]."""

    x: Tensor
    logistic: Tensor
    silu: Tensor
    first: Tensor


def swiglu(x: Tensor) -> tuple[Tensor, SwigluSaved]:
    """y = f(g) u of x packed [g | u], with f(g) = g sigma(g), sigma the logistic function: f' = sigma + f (1 - sigma).

    Returns Y [2, ..., o] of X [2, ..., 2 o], and what the way back needs.
    """
    precise = x.to(accumulation_dtype(x.dtype))
    (gate, up), (gate_tangent, up_tangent) = precise[0].chunk(2, -1), precise[1].chunk(2, -1)  # [..., o] each
    logistic = torch.sigmoid(gate)
    silu = gate * logistic
    first = logistic + silu * (1.0 - logistic)
    y_tangent = (first * gate_tangent).mul_(up).addcmul_(silu, up_tangent)  # ẏ = f' ġ u + f u̇
    return torch.stack((silu * up, y_tangent)).to(x.dtype), SwigluSaved(precise, logistic, silu, first)


def swiglu_backward(adjoint: Tensor, saved: SwigluSaved, coupled: bool) -> Tensor:
    """The adjoint of ``swiglu``'s input: ū = ȳ f, ḡ = ȳ f' u and dū = dȳ f + ȳ f' ġ, dḡ = dȳ f' u + ȳ (f'' ġ u + f' u̇).

    f'' = (1 - sigma) (sigma + f') - f sigma (1 - sigma).
    """
    x, logistic, silu, first = saved
    up = x[0].chunk(2, -1)[1]  # [..., o], like all but out
    out = torch.empty_like(x)  # [2, ..., 2 o]
    gate_out, up_out = out.chunk(2, -1)
    torch.mul(adjoint, silu, out=up_out)
    torch.mul(adjoint, first * up, out=gate_out)
    if coupled:
        gate_tangent, up_tangent = x[1].chunk(2, -1)
        second = (1.0 - logistic).mul_(logistic + first).addcmul_(silu, logistic * (1.0 - logistic), value=-1)
        up_out[0].addcmul_(adjoint[1], first * gate_tangent)
        gate_out[0].addcmul_(adjoint[1], (second * gate_tangent).mul_(up).addcmul_(first, up_tangent))
    return out.to(adjoint.dtype)


def softmax(scores: Tensor) -> Tensor:
    """P [n, queries, keys] of scores."""
    return torch.softmax(scores, -1, dtype=accumulation_dtype(scores.dtype)).to(scores.dtype)


def softmax_pair(scores: Tensor, scores_tangent: Tensor) -> tuple[Tensor, Tensor]:
    """P and Ṗ = P (Ṡ - Σ P Ṡ) [n, queries, keys], sums over keys, in the dtype of the scores; may overwrite Ṡ."""
    p = torch.softmax(scores, -1, dtype=accumulation_dtype(scores.dtype))
    p_tangent = scores_tangent.to(p.dtype).mul_(p)
    p_tangent.addcmul_(p, p_tangent.sum(-1, keepdim=True), value=-1)
    return p.to(scores.dtype), p_tangent.to(scores.dtype)


def softmax_backward(p: Tensor, p_tangent: Tensor, m: Tensor, m_tangent: Tensor) -> tuple[Tensor, Tensor]:
    """N = P (M - m) with m = Σ P M, and Ṅ = Ṗ (M - m) + P (Ṁ - ṁ) with ṁ = Σ (Ṗ M + P Ṁ); all [n, queries, keys]."""
    centred = m - (p * m).sum(-1, keepdim=True)
    n_tangent = torch.addcmul(p * m_tangent, p_tangent, centred)  # its sum is ṁ, because Σ Ṗ = 0
    return p * centred, n_tangent - p * n_tangent.sum(-1, keepdim=True)


def log_softmax_sums(logits: Tensor, out: Tensor) -> Tensor:
    """out = softmax(logits) [R, v]; returns log Σ exp(logits) [R].

    The largest probability is exp(largest logit) / Σ, so two maxima give the sum without a second pass of exponentials.
    That probability is at least 1 / v: it cannot underflow.
    """
    torch.softmax(logits, -1, out=out)
    return logits.amax(1) - out.amax(1).log()


def centre(logits: Tensor, p: Tensor) -> Tensor:
    """Turn ``logits``, ẋ [R, v], into p (ẋ - s) with s = <p, ẋ> by row, in place; returns s [R]."""
    mean = logits.mul_(p).sum(1)
    logits.addcmul_(p, mean.unsqueeze(1), value=-1)
    return mean


class Kernels(NamedTuple):
    """The functions of this module, as they stand or compiled."""

    norm: Callable
    norm_backward: Callable
    gelu: Callable
    gelu_backward: Callable
    swiglu: Callable
    swiglu_backward: Callable
    softmax: Callable
    softmax_pair: Callable
    softmax_backward: Callable
    log_softmax_sums: Callable
    centre: Callable


EAGER = Kernels(
    norm,
    norm_backward,
    gelu,
    gelu_backward,
    swiglu,
    swiglu_backward,
    softmax,
    softmax_pair,
    softmax_backward,
    log_softmax_sums,
    centre,
)


RAGGED = ("softmax", "softmax_pair", "softmax_backward", "log_softmax_sums", "centre")
"""Kernels whose shapes change from call to call (blocks of attention, chunks of the head): sizes stay symbols."""


@functools.cache
def _compiled() -> Kernels:
    functions = EAGER._asdict().items()
    return Kernels(**{name: torch.compile(function, dynamic=name in RAGGED) for name, function in functions})


def kernels(compiled: bool) -> Kernels:
    """The functions of this module; compiled ones are made at their first call, which needs a compiler on a CPU."""
    return _compiled() if compiled else EAGER
