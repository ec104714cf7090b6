"""The operations of a transformer block on dual numbers, each with its own analytic backward pass.

A dual activation is one stacked tensor X [2, ...]: X[0] the value x, X[1] its tangent ẋ along a direction z of the
parameters. Running a block on it is one forward-mode pass.

Reverse-differentiating the tangent of a loss by such a stack gives a stack of cotangents A [2, ...] with

    A[1] = x̄, the ordinary adjoint of x             (the derivative of the tangent by ẋ, in which it is linear)
    A[0] = dx̄, the tangent of that adjoint along z  (the derivative of the tangent by x: by x and along z commute)

so the backward pass of a dual operation is the operation's ordinary backward pass, in dual numbers, and for a weight W
it yields both the gradient (from A[1]) and the Hessian product (from A[0] and A[1]). Both are added into the caller's
``gradient`` and ``product`` tensors by name; autograd only carries the activations. With ``coupled`` false the terms
in which A[1] meets a tangent are dropped: what is left sends A[0] through the transposed Jacobian as a second,
independent cotangent, which is what a Gauss-Newton product needs.

Shapes: b batch, s sequence, w width in, o width out, r the rows b s of a matrix product.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_bliss.bilevel.attention import DualAttention
from megatron_bliss.bilevel.kernels import EAGER, Kernels, NormSaved, SwigluSaved
from megatron_bliss.bilevel.vector import add_product
from megatron_bliss.models.operations import Rotary
from megatron_bliss.models.presets import Architecture


@dataclass
class Duals:
    """Block operations on dual activations [2, b, s, w]; the methods are those of ``models.operations.Values``.

    Parameters and their tangents, ``vector``, by name; a block's names begin with ``prefix``.
    """

    parameters: dict[str, Tensor]
    vector: dict[str, Tensor]
    prefix: str
    rotary: Rotary
    arch: Architecture
    _: KW_ONLY
    gradient: dict[str, Tensor] | None = None
    """Sums to which the backward pass adds gradients; None where there is none."""
    product: dict[str, Tensor] | None = None
    """The same for products."""
    coupled: bool = True
    kernels: Kernels = EAGER

    def linear(self, x: Tensor, name: str) -> Tensor:
        """x Wᵀ + bias."""
        return _Linear.apply(x, self, self.prefix + name)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """LayerNorm (GPT-NeoX) or RMSNorm (LLaMA) over the last dimension."""
        return _Norm.apply(x, self, self.prefix + name)

    def gelu(self, x: Tensor) -> Tensor:
        """x Φ(x)."""
        return _Gelu.apply(x, self)

    def swiglu(self, x: Tensor) -> Tensor:
        """silu(gate) * up, of x packed [gate | up]."""
        return _SwiGLU.apply(x, self)

    def attention(self, packed: Tensor) -> Tensor:
        """Causal softmax attention of packed [queries | keys | values] with rotary positions."""
        return DualAttention.apply(packed, self.rotary, self.arch, self.coupled, self.kernels)


class _Linear(Function):
    """y = x Wᵀ + c, ẏ = ẋ Wᵀ + x Ẇᵀ + ċ.

    Back: x̄ = ȳ W, dx̄ = dȳ W + ȳ Ẇ; W̄ = ȳᵀ x, dW̄ = dȳᵀ x + ȳᵀ ẋ; c̄ = Σ ȳ, dc̄ = Σ dȳ. Gauss-Newton drops ȳ Ẇ and ȳᵀ ẋ.
    """

    @staticmethod
    def forward(ctx, x: Tensor, ops: Duals, name: str) -> Tensor:
        weight, weight_tangent = ops.parameters[name + ".weight"], ops.vector[name + ".weight"]  # [o, w]
        value, tangent = x.reshape(2, -1, x.shape[-1])  # [r, w]
        out = x.new_empty(*x.shape[:-1], weight.shape[0])  # [2, b, s, o], written in place: no copy to stack y and ẏ
        y, y_tangent = out.view(2, -1, weight.shape[0])  # [r, o]
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
        weight = ops.parameters[name + ".weight"]  # [o, w]
        x_rows = x.reshape(-1, x.shape[-1])  # x, then ẋ: [2 r, w]
        rows = adjoint.reshape(-1, adjoint.shape[-1])  # dȳ, then ȳ: [2 r, o]
        count = len(rows) // 2
        x_adjoint = rows @ weight  # dȳ W, then ȳ W: [2 r, w]
        if ops.coupled:
            x_adjoint[:count].addmm_(rows[count:], ops.vector[name + ".weight"])
            # dȳ stands beside x and ȳ beside ẋ: one product over 2 r rows is dȳᵀ x + ȳᵀ ẋ.
            add_product(ops.product[name + ".weight"], rows.t(), x_rows)
        else:
            add_product(ops.product[name + ".weight"], rows[:count].t(), x_rows[:count])
        add_product(ops.gradient[name + ".weight"], rows[count:].t(), x_rows[:count])
        if name + ".bias" in ops.parameters:
            ops.product[name + ".bias"].add_(rows[:count].sum(0))
            ops.gradient[name + ".bias"].add_(rows[count:].sum(0))
        return x_adjoint.view(x.shape), None, None


class _Norm(Function):
    """LayerNorm or RMSNorm (``kernels.norm``)."""

    @staticmethod
    def forward(ctx, x: Tensor, ops: Duals, name: str) -> Tensor:
        weight, bias = name + ".weight", name + ".bias"
        parameters, vector = ops.parameters, ops.vector
        biases = (parameters[bias], vector[bias]) if ops.arch.architecture == "gpt_neox" else (None, None)
        out, saved = ops.kernels.norm(x, parameters[weight], vector[weight], *biases, ops.arch.norm_epsilon)
        ctx.save_for_backward(*saved)
        ctx.ops, ctx.name = ops, name
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, adjoint: Tensor):
        ops, weight, bias = ctx.ops, ctx.name + ".weight", ctx.name + ".bias"
        centred = ops.arch.architecture == "gpt_neox"
        saved = NormSaved(*ctx.saved_tensors)
        out, sums = ops.kernels.norm_backward(
            adjoint, saved, ops.parameters[weight], ops.vector[weight], centred, ops.coupled
        )
        ops.gradient[weight].add_(sums.weight_gradient)
        ops.product[weight].add_(sums.weight_product)
        if centred:
            ops.gradient[bias].add_(sums.bias_gradient)
            ops.product[bias].add_(sums.bias_product)
        return out, None, None


class _Gelu(Function):
    """``kernels.gelu``."""

    @staticmethod
    def forward(ctx, x: Tensor, ops: Duals) -> Tensor:
        out, *saved = ops.kernels.gelu(x, ops.coupled)
        ctx.save_for_backward(*saved)
        ctx.ops = ops
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, adjoint: Tensor):
        return ctx.ops.kernels.gelu_backward(adjoint, *ctx.saved_tensors), None


class _SwiGLU(Function):
    """``kernels.swiglu``."""

    @staticmethod
    def forward(ctx, x: Tensor, ops: Duals) -> Tensor:
        out, saved = ops.kernels.swiglu(x)
        ctx.save_for_backward(*saved)
        ctx.ops = ops
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, adjoint: Tensor):
        return ctx.ops.kernels.swiglu_backward(adjoint, SwigluSaved(*ctx.saved_tensors), ctx.ops.coupled), None
