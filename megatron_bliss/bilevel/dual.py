"""The operations of a transformer block on dual numbers, each with its own analytic backward pass.

A dual activation is one stacked tensor X [2, ...]: X[0] the value x, X[1] its tangent ẋ along a direction z of the
parameters. Running a block on it is one forward-mode pass.

Reverse-differentiating the tangent of a loss by such a stack gives a stack of cotangents A [2, ...] with

    A[1] = x̄, the ordinary adjoint of x                (the derivative of the tangent by ẋ)
    A[0] = the tangent of that adjoint along z          (the derivative of the tangent by x)

so the backward pass of a dual operation is the operation's ordinary backward pass, in dual numbers, and for a weight W
it yields both the gradient (from A[1]) and the Hessian product (from A[0] and A[1]). Both are added into the caller's
``gradient`` and ``product`` tensors by name; autograd only carries the activations. With ``coupled`` false the terms
in which A[1] meets a tangent are dropped: what is left sends A[0] through the transposed Jacobian as a second,
independent cotangent, which is what a Gauss-Newton product needs.

Shapes: b batch, s sequence, w width in, o width out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_bliss.bilevel.attention import DualAttention
from megatron_bliss.bilevel.vector import accumulation_dtype, add_product
from megatron_bliss.models.operations import Rotary
from megatron_bliss.models.presets import Architecture


class Duals:
    """Block operations on dual activations [2, b, s, w]; the methods are those of ``models.operations.Values``.

    ``gradient`` and ``product`` collect what the backward pass finds, by parameter name.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        vector: dict[str, Tensor],
        prefix: str,
        rotary: Rotary,
        arch: Architecture,
        *,
        gradient: dict[str, Tensor] | None = None,
        product: dict[str, Tensor] | None = None,
        coupled: bool = True,
    ):
        self.parameters, self.vector, self.prefix, self.rotary, self.arch = parameters, vector, prefix, rotary, arch
        self.gradient, self.product, self.coupled = gradient, product, coupled

    def linear(self, x: Tensor, name: str) -> Tensor:
        """x Wᵀ + bias."""
        return _Linear.apply(x, self, self.prefix + name)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """LayerNorm (GPT-NeoX) or RMSNorm (LLaMA) over the last dimension."""
        return _Norm.apply(x, self, self.prefix + name)

    def gelu(self, x: Tensor) -> Tensor:
        """x Φ(x)."""
        return _Gelu.apply(x, self.coupled)

    def swiglu(self, x: Tensor) -> Tensor:
        """silu(gate) * up, of x packed [gate | up]."""
        return _SwiGLU.apply(x, self.coupled)

    def attention(self, packed: Tensor) -> Tensor:
        """Causal softmax attention of packed [queries | keys | values] with rotary positions."""
        return DualAttention.apply(packed, self.rotary, self.arch, self.coupled)


class _Linear(Function):
    """y = x Wᵀ + c, ẏ = ẋ Wᵀ + x Ẇᵀ + ċ."""

    @staticmethod
    def forward(ctx, x: Tensor, ops: Duals, name: str) -> Tensor:
        weight, weight_tangent = ops.parameters[name + ".weight"], ops.vector[name + ".weight"]
        value, tangent = x.reshape(2, -1, x.shape[-1])
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        y, y_tangent = out.view(2, -1, weight.shape[0])
        bias = ops.parameters.get(name + ".bias")
        if bias is None:
            torch.mm(value, weight.t(), out=y)
            torch.mm(value, weight_tangent.t(), out=y_tangent)
        else:
            torch.addmm(bias, value, weight.t(), out=y)
            torch.addmm(ops.vector[name + ".bias"], value, weight_tangent.t(), out=y_tangent)
        y_tangent.addmm_(tangent, weight.t())
        ctx.save_for_backward(x)
        ctx.ops, ctx.name = ops, name
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, adjoint: Tensor):
        (x,), ops, name = ctx.saved_tensors, ctx.ops, ctx.name
        weight = ops.parameters[name + ".weight"]
        x_rows, rows = x.reshape(-1, x.shape[-1]), adjoint.reshape(-1, adjoint.shape[-1])
        count = len(rows) // 2
        x_adjoint = rows @ weight
        if ops.coupled:
            x_adjoint[:count].addmm_(rows[count:], ops.vector[name + ".weight"])
            add_product(ops.product[name + ".weight"], rows.t(), x_rows)
        else:
            add_product(ops.product[name + ".weight"], rows[:count].t(), x_rows[:count])
        add_product(ops.gradient[name + ".weight"], rows[count:].t(), x_rows[:count])
        if name + ".bias" in ops.parameters:
            ops.product[name + ".bias"].add_(rows[:count].sum(0))
            ops.gradient[name + ".bias"].add_(rows[count:].sum(0))
        return x_adjoint.view(x.shape), None, None


class _Norm(Function):
    """y = u w + c with u = rho (x - mean x), rho = (mean (x - mean x)² + eps)^-1/2; RMSNorm has no mean and no c.

    The Jacobian of u is rho P with the symmetric P(v) = v - mean v - u mean(u v), and the tangent of rho is
    -rho² mean(u ẋ).
    """

    @staticmethod
    def forward(ctx, x: Tensor, ops: Duals, name: str) -> Tensor:
        centred = ops.arch.architecture == "gpt_neox"
        precise = x.to(accumulation_dtype(x.dtype))
        value, tangent = precise[0], precise[1]
        if centred:
            unit, _, rho = torch.native_layer_norm(value, value.shape[-1:], None, None, ops.arch.norm_epsilon)
        else:
            rho = torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + ops.arch.norm_epsilon)
            unit = value * rho
        along = (unit * tangent).mean(-1, keepdim=True)
        unit_tangent = _project(tangent, unit, along, centred).mul_(rho)
        weight, weight_tangent = ops.parameters[name + ".weight"], ops.vector[name + ".weight"]
        out = torch.stack((unit * weight, unit_tangent * weight))
        out[1].addcmul_(unit, weight_tangent)
        if centred:
            out[0].add_(ops.parameters[name + ".bias"])
            out[1].add_(ops.vector[name + ".bias"])
        ctx.save_for_backward(unit, unit_tangent, rho, along)
        ctx.ops, ctx.name, ctx.centred = ops, name, centred
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, adjoint: Tensor):
        unit, unit_tangent, rho, along = ctx.saved_tensors
        ops, name, centred = ctx.ops, ctx.name, ctx.centred
        weight = ops.parameters[name + ".weight"]
        adjoint = adjoint.to(unit.dtype)
        y_dot, y_bar = adjoint[0], adjoint[1]
        bar, dot = y_bar * weight, y_dot * weight
        bar_along = (bar * unit).mean(-1, keepdim=True)
        out = torch.empty_like(adjoint)
        projected = _project(bar, unit, bar_along, centred)
        torch.mul(projected, rho, out=out[1])
        if ops.coupled:
            dot.addcmul_(y_bar, ops.vector[name + ".weight"])
            dot_along = (dot * unit).add_(bar * unit_tangent).mean(-1, keepdim=True)
            change = _project(dot, unit, dot_along, centred).addcmul_(unit_tangent, bar_along, value=-1)
            torch.mul(change.addcmul_(projected, along * rho, value=-1), rho, out=out[0])
        else:
            dot_along = (dot * unit).mean(-1, keepdim=True)
            torch.mul(_project(dot, unit, dot_along, centred), rho, out=out[0])
        _add_norm_sums(ops, name, y_dot, y_bar, unit, unit_tangent)
        return out.to(ops.parameters[name + ".weight"].dtype), None, None


def _project(v: Tensor, unit: Tensor, along: Tensor, centred: bool) -> Tensor:
    """v - mean v - unit * along, a new tensor; without the mean for RMSNorm."""
    v = v - v.mean(-1, keepdim=True) if centred else v.clone()
    return v.addcmul_(unit, along, value=-1)


def _add_norm_sums(ops: Duals, name: str, y_dot: Tensor, y_bar: Tensor, unit: Tensor, unit_tangent: Tensor) -> None:
    rows = tuple(range(y_bar.ndim - 1))
    ops.gradient[name + ".weight"].add_((y_bar * unit).sum(rows))
    change = y_dot * unit
    if ops.coupled:
        change.addcmul_(y_bar, unit_tangent)
    ops.product[name + ".weight"].add_(change.sum(rows))
    if name + ".bias" in ops.parameters:
        ops.gradient[name + ".bias"].add_(y_bar.sum(rows))
        ops.product[name + ".bias"].add_(y_dot.sum(rows))


class _Gelu(Function):
    """y = x Φ(x): y' = Φ + x φ, y'' = (2 - x²) φ, with Φ and φ the normal distribution function and its density.

    y' and y'' ẋ are made in the forward pass, where the one costly erf is, and are all that the backward pass needs.
    """

    @staticmethod
    def forward(ctx, x: Tensor, coupled: bool) -> Tensor:
        precise = x.to(accumulation_dtype(x.dtype))
        value, tangent = precise[0], precise[1]
        distribution = torch.erf(value * math.sqrt(0.5)).add_(1.0).mul_(0.5)
        square = value * value
        density = torch.exp(square * -0.5).mul_(1.0 / math.sqrt(2.0 * math.pi))
        out = torch.empty_like(precise)
        torch.mul(value, distribution, out=out[0])
        first = distribution.addcmul_(value, density)
        torch.mul(first, tangent, out=out[1])
        second = square.neg_().add_(2.0).mul_(density).mul_(tangent) if coupled else None
        ctx.save_for_backward(first, second)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, adjoint: Tensor):
        first, second = ctx.saved_tensors
        out = adjoint * first
        if second is not None:
            out[0].addcmul_(adjoint[1], second)
        return out.to(adjoint.dtype), None


class _SwiGLU(Function):
    """y = f(g) u with f(g) = g sigma(g), sigma the logistic function: f' = sigma + f (1 - sigma)."""

    @staticmethod
    def forward(ctx, x: Tensor, coupled: bool) -> Tensor:
        precise = x.to(accumulation_dtype(x.dtype))
        (gate, up), (gate_tangent, up_tangent) = precise[0].chunk(2, -1), precise[1].chunk(2, -1)
        logistic = torch.sigmoid(gate)
        silu = gate * logistic
        first = logistic + silu * (1.0 - logistic)
        y_tangent = (first * gate_tangent).mul_(up).addcmul_(silu, up_tangent)
        ctx.save_for_backward(precise, logistic, silu, first)
        ctx.coupled = coupled
        return torch.stack((silu * up, y_tangent)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, adjoint: Tensor):
        x, logistic, silu, first = ctx.saved_tensors
        up = x[0].chunk(2, -1)[1]
        out = torch.empty_like(x)
        gate_out, up_out = out.chunk(2, -1)
        torch.mul(adjoint, silu, out=up_out)
        torch.mul(adjoint, first * up, out=gate_out)
        if ctx.coupled:
            gate_tangent, up_tangent = x[1].chunk(2, -1)
            second = (1.0 - logistic).mul_(logistic + first).addcmul_(silu, logistic * (1.0 - logistic), value=-1)
            up_out[0].addcmul_(adjoint[1], first * gate_tangent)
            gate_out[0].addcmul_(adjoint[1], (second * gate_tangent).mul_(up).addcmul_(first, up_tangent))
        return out.to(adjoint.dtype), None
