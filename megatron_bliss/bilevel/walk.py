"""The walk through the blocks: forward once, back once, keeping only each block's input where memory asks for it.

A walk has ``forward(x) -> y`` (input of the first block to output of the last) and ``backward(adjoint) -> adjoint of
x``; parameters' gradients and products are added to the scene's vectors. The caller has gradients switched off.

Shapes: b samples, s tokens, w hidden size; a leading 2 as in dual.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_bliss.bilevel.dual import Duals
from megatron_bliss.bilevel.kernels import EAGER, Kernels
from megatron_bliss.bilevel.vector import add_by_name
from megatron_bliss.models.operations import Rotary, Values
from megatron_bliss.models.presets import Architecture
from megatron_bliss.models.transformer import BLOCKS, block_prefixes


@dataclass
class Scene:
    """What every operation of one pass needs."""

    arch: Architecture
    parameters: dict[str, Tensor]
    rotary: Rotary
    vector: dict[str, Tensor] = field(default_factory=dict)
    gradient: dict[str, Tensor] = field(default_factory=dict)
    product: dict[str, Tensor] = field(default_factory=dict)
    gauss_newton: bool = False
    kernels: Kernels = EAGER

    def duals(self, prefix: str) -> Duals:
        """Operations on (value, tangent) pairs for the parameters under ``prefix``."""
        return Duals(
            self.parameters,
            self.vector,
            prefix,
            self.rotary,
            self.arch,
            gradient=self.gradient,
            product=self.product,
            coupled=not self.gauss_newton,
            kernels=self.kernels,
        )

    def values(self, prefix: str, parameters: dict[str, Tensor] | None = None) -> Values:
        """Operations on values alone."""
        return Values(parameters or self.parameters, prefix, self.rotary, self.arch)

    @property
    def block(self) -> Callable:
        """The block function of the family."""
        return BLOCKS[self.arch.architecture]


class Walk:
    """Forward and back through the blocks on plain values [b, s, w]: an ordinary gradient."""

    def __init__(self, scene: Scene, *, keep: bool):
        self.scene, self.keep = scene, keep
        self.inputs: list[Tensor] = []
        self.whole: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """All blocks, keeping their graph or each one's input."""
        prefixes = block_prefixes(self.scene.arch)
        if not self.keep:
            for prefix in prefixes:
                self.inputs.append(x)
                x = self.run(prefix, x, {})
            return x
        # one graph over all blocks; it starts at leaves of its own, so that nothing reaches the model's parameters
        start, leaves = x.requires_grad_(), self.leaves("blocks.")
        with torch.enable_grad():
            for prefix in prefixes:
                x = self.run(prefix, x, leaves)
        self.whole = x, start, leaves
        return x.detach()

    def backward(self, adjoint: Tensor) -> Tensor:
        """The adjoint of the first block's input; block by block where only inputs were kept."""
        if self.keep:
            whole, self.whole = self.whole, None  # so that autograd frees the graph as it goes
            return self.differentiate(*whole, adjoint)
        for prefix in reversed(block_prefixes(self.scene.arch)):
            x, leaves = self.inputs.pop().requires_grad_(), self.leaves(prefix)
            with torch.enable_grad():
                y = self.run(prefix, x, leaves)
            adjoint = self.differentiate(y, x, leaves, adjoint)
        return adjoint

    def run(self, prefix: str, x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        """One block."""
        return self.scene.block(self.scene.values(prefix, leaves), x)

    def leaves(self, prefix: str) -> dict[str, Tensor]:
        """The parameters under ``prefix`` as fresh leaves that share their memory."""
        parameters = self.scene.parameters.items()
        return {name: p.detach().requires_grad_() for name, p in parameters if name.startswith(prefix)}

    def differentiate(self, y: Tensor, x: Tensor, leaves: dict[str, Tensor], adjoint: Tensor) -> Tensor:
        """The adjoint of x from y's; the leaves' gradients are added to the scene's."""
        found = torch.autograd.grad(y, [x, *leaves.values()], adjoint)
        add_by_name(self.scene.gradient, leaves, found[1:])
        return found[0]


class DualWalk(Walk):
    """Dual activations [2, b, s, w] forward, [tangent of the adjoint, adjoint] back; the operations add up the sums."""

    def run(self, prefix: str, x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        """One block in dual numbers."""
        return self.scene.block(self.scene.duals(prefix), x)

    def leaves(self, prefix: str) -> dict[str, Tensor]:
        """None: autograd carries activations only."""
        return {}


class GaussNewtonWalk(Walk):
    """Dual activations forward; back, plain blocks recomputed and two cotangents [2, b, s, w] sent through each.

    A Gauss-Newton product is Jᵀ (M (J z)): forward mode gives J z, and the way back is the transposed Jacobian, which
    knows no tangents. So the blocks' tangents need not be kept.
    """

    def __init__(self, scene: Scene):
        super().__init__(scene, keep=False)

    def forward(self, x: Tensor) -> Tensor:
        """One forward-mode pass, keeping the value of each block's input."""
        for prefix in block_prefixes(self.scene.arch):
            self.inputs.append(x[0].clone())  # a view would keep the tangent alive
            x = self.scene.block(self.scene.duals(prefix), x)
        return x

    def differentiate(self, y: Tensor, x: Tensor, leaves: dict[str, Tensor], adjoint: Tensor) -> Tensor:
        """[Gauss-Newton cotangent, adjoint] of x from y's; products and gradients are added to the scene's."""
        out = torch.empty_like(adjoint)  # [2, b, s, w]
        for index, sums in ((1, self.scene.gradient), (0, self.scene.product)):
            found = torch.autograd.grad(y, [x, *leaves.values()], adjoint[index], retain_graph=index == 1)
            out[index] = found[0]
            add_by_name(sums, leaves, found[1:])
        return out
