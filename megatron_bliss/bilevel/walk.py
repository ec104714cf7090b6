"""The walk through the blocks: forward once, back once, keeping only each block's input where memory asks for it.

A walk has ``forward(x) -> y`` (input of the first block to output of the last) and ``backward(adjoint) -> adjoint of
x``; parameters' gradients and products are added to the vectors it was made with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_bliss.bilevel.dual import Duals
from megatron_bliss.models.operations import Rotary, Values
from megatron_bliss.models.presets import Architecture
from megatron_bliss.models.transformer import BLOCKS, block_prefixes

KEEP_BYTES = 512 * 2**20
"""Graphs are kept for the way back when they are estimated to take less than this; else blocks are recomputed."""


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

    def duals(self, prefix: str) -> Duals:
        """Operations on (value, tangent) pairs for the parameters under ``prefix``."""
        sums = {"gradient": self.gradient, "product": self.product, "coupled": not self.gauss_newton}
        return Duals(self.parameters, self.vector, prefix, self.rotary, self.arch, **sums)

    def values(self, prefix: str, parameters: dict[str, Tensor] | None = None) -> Values:
        """Operations on values alone."""
        return Values(parameters or self.parameters, prefix, self.rotary, self.arch)

    @property
    def block(self) -> Callable:
        """The block function of the family."""
        return BLOCKS[self.arch.architecture]


def keeps_graph(arch: Architecture, tokens: int, element_size: int, *, dual: bool, recompute: bool | None) -> bool:
    """Whether the blocks' graphs over ``tokens`` tokens are kept; ``recompute`` None decides by estimated size."""
    if recompute is not None:
        return not recompute
    width, ffn = arch.hidden_size, arch.ffn_hidden_size
    ffn_tensors = 3 if arch.architecture == "gpt_neox" else 5
    per_block = (5 * width + 2 * arch.query_key_value_size + ffn_tensors * ffn) * (2 if dual else 1)
    return arch.num_layers * per_block * tokens * element_size <= KEEP_BYTES


class DualWalk:
    """Dual activations [2, b, s, w] forward, [tangent of the adjoint, adjoint] back."""

    def __init__(self, scene: Scene, *, keep: bool):
        self.scene, self.keep = scene, keep
        self.inputs: list[Tensor] = []
        self.ends: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """One forward-mode pass through all blocks."""
        scene, start = self.scene, x
        if self.keep:
            start = x = x.requires_grad_()
        with torch.set_grad_enabled(self.keep):
            for prefix in block_prefixes(scene.arch):
                if not self.keep:
                    self.inputs.append(x)
                x = scene.block(scene.duals(prefix), x)
        if self.keep:
            self.ends = start, x
        return x.detach()

    def backward(self, adjoint: Tensor) -> Tensor:
        """The blocks' backward passes in dual numbers."""
        if self.keep:
            start, end = self.ends
            self.ends = None
            return torch.autograd.grad(end, start, adjoint)[0]
        for prefix in reversed(block_prefixes(self.scene.arch)):
            x = self.inputs.pop().requires_grad_()
            with torch.enable_grad():
                y = self.scene.block(self.scene.duals(prefix), x)
            (adjoint,) = torch.autograd.grad(y, x, adjoint)
            del y
        return adjoint


class DualForward:
    """Dual activations forward, nothing kept: directional derivatives alone."""

    def __init__(self, scene: Scene):
        self.scene = scene

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """One forward-mode pass through all blocks."""
        for prefix in block_prefixes(self.scene.arch):
            x = self.scene.block(self.scene.duals(prefix), x)
        return x


class GaussNewtonWalk:
    """Dual activations forward; back, plain blocks recomputed and two cotangents [2, b, s, w] sent through each."""

    def __init__(self, scene: Scene):
        self.scene = scene
        self.inputs: list[Tensor] = []

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """One forward-mode pass, keeping the value of each block's input."""
        for prefix in block_prefixes(self.scene.arch):
            self.inputs.append(x[0].clone())
            x = self.scene.block(self.scene.duals(prefix), x)
        return x

    def backward(self, adjoint: Tensor) -> Tensor:
        """[Gauss-Newton cotangent, adjoint] back; products and gradients are added to the scene's vectors."""
        scene = self.scene
        for prefix in reversed(block_prefixes(scene.arch)):
            x = self.inputs.pop().requires_grad_()
            leaves = _leaves(scene.parameters, prefix)
            with torch.enable_grad():
                y = scene.block(scene.values(prefix, leaves), x)
            out = torch.empty_like(adjoint)
            for index, sums in ((1, scene.gradient), (0, scene.product)):
                found = torch.autograd.grad(y, [x, *leaves.values()], adjoint[index], retain_graph=index == 1)
                out[index] = found[0]
                _add(sums, leaves, found[1:])
            adjoint = out
        return adjoint


class ValueWalk:
    """Plain activations [b, s, w] forward and their adjoints back: an ordinary gradient."""

    def __init__(self, scene: Scene, *, keep: bool):
        self.scene, self.keep = scene, keep
        self.inputs: list[Tensor] = []
        self.leaves: dict[str, Tensor] = {}
        self.ends: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """All blocks."""
        scene, start = self.scene, x
        if self.keep:
            start = x = x.requires_grad_()
            self.leaves = _leaves(scene.parameters, "blocks.")
        with torch.set_grad_enabled(self.keep):
            for prefix in block_prefixes(scene.arch):
                if not self.keep:
                    self.inputs.append(x)
                x = scene.block(scene.values(prefix, self.leaves), x)
        if self.keep:
            self.ends = start, x
        return x.detach()

    def backward(self, adjoint: Tensor) -> Tensor:
        """An ordinary backward pass, block by block where nothing was kept."""
        if self.keep:
            start, end = self.ends
            self.ends = None
            return self._differentiate(end, start, self.leaves, adjoint)
        for prefix in reversed(block_prefixes(self.scene.arch)):
            x, leaves = self.inputs.pop().requires_grad_(), _leaves(self.scene.parameters, prefix)
            with torch.enable_grad():
                y = self.scene.block(self.scene.values(prefix, leaves), x)
            adjoint = self._differentiate(y, x, leaves, adjoint)
        return adjoint

    def _differentiate(self, y: Tensor, x: Tensor, leaves: dict[str, Tensor], adjoint: Tensor) -> Tensor:
        found = torch.autograd.grad(y, [x, *leaves.values()], adjoint)
        _add(self.scene.gradient, leaves, found[1:])
        return found[0]


def _leaves(parameters: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The parameters under ``prefix`` as fresh leaves that share their memory."""
    return {name: p.detach().requires_grad_() for name, p in parameters.items() if name.startswith(prefix)}


def _add(sums: dict[str, Tensor], leaves: dict[str, Tensor], found: tuple[Tensor, ...]) -> None:
    for name, gradient in zip(leaves, found, strict=True):
        sums[name].add_(gradient)
