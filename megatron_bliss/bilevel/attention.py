"""Causal attention on dual numbers, in blocks of samples, heads and queries.

With scores S = q kᵀ (q scaled and rotated), P = softmax(S), O = P v and tangents marked by a dot:

    Ṡ = q̇ kᵀ + q k̇ᵀ          Ṗ = P (Ṡ - Σ P Ṡ)          Ȯ = Ṗ v + P v̇

and back, Ō the adjoint of O and dŌ that adjoint's tangent (sums run over keys; M and N are the adjoints of P and S):

    M = Ō vᵀ                    N = P (M - m),  m = Σ P M
    Ṁ = dŌ vᵀ + Ō v̇ᵀ            Ṅ = Ṗ (M - m) + P (Ṁ - ṁ),  ṁ = Σ (Ṗ M + P Ṁ)
    v̄ = Pᵀ Ō                    q̄ = N k                      k̄ = Nᵀ q
    dv̄ = Ṗᵀ Ō + Pᵀ dŌ           dq̄ = Ṅ k + N k̇               dk̄ = Ṅᵀ q + Nᵀ q̇

Gauss-Newton (not ``coupled``) has two cotangents in the places of Ō and dŌ that do not meet: every dotted P, v, k and q
drops out of what goes back.

No matrix of all queries by all keys of the whole batch exists: a block holds at most ``BLOCK_ELEMENTS`` scores (or one
group's), future keys are skipped, and the backward pass makes P and Ṗ again, since to keep them is to keep all scores.
Stacks hold [value, tangent] going forward and [tangent of the adjoint, adjoint] going back, as in dual.py.

Shapes: n samples times query groups, r heads of a group, s sequence, d channels of a head; of a block, e entries of n,
i queries, j keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_bliss.bilevel.kernels import Kernels
from megatron_bliss.models.operations import Rotary, merge_heads, rotate, split_heads
from megatron_bliss.models.presets import Architecture

BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}
QUERY_BLOCK = 128


class _Heads(NamedTuple):
    """Values and tangents, or adjoints and theirs, of rotated and scaled queries, rotated keys, and values."""

    query: Tensor
    """[2, n, r, s, d]."""
    key: Tensor
    """[2, n, s, d]."""
    value: Tensor
    """[2, n, s, d]."""


class _Block(NamedTuple):
    """Entries ``heads`` of n, queries ``first`` to ``last``, keys 0 to ``last``."""

    heads: slice
    first: int
    last: int

    @property
    def past(self) -> tuple[slice, slice]:
        """The keys that the block's last query sees: an index into [n, s, d]."""
        return self.heads, slice(self.last)


def _blocks(count: int, per_group: int, length: int, device: torch.device) -> Iterator[_Block]:
    """Blocks that cover all queries once: queries outside, so that the keys of a block end with its last query."""
    budget = BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cuda"])
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        step = max(1, min(budget // (per_group * (last - first) * last), -(-count // 2)))
        for head in range(0, count, step):
            yield _Block(slice(head, min(head + step, count)), first, last)


class DualAttention(Function):
    """Packed [2, b, s, (H + 2G) d] of values and tangents to [2, b, s, H d]; saves its input alone."""

    @staticmethod
    def forward(ctx, packed: Tensor, rotary: Rotary, arch: Architecture, coupled: bool, kernels: Kernels) -> Tensor:
        heads = _unpack(packed, rotary, arch)
        out = torch.empty_like(heads.query)  # O and Ȯ [2, n, r, s, d]
        for block in _blocks(*heads.query.shape[1:4], packed.device):
            p, p_tangent = _probabilities(heads, block, kernels)  # [e, r i, j]
            v, v_tangent = heads.value[0][block.past], heads.value[1][block.past]  # [e, j, d]
            _store(out, 0, block, torch.bmm(p, v))
            _store(out, 1, block, torch.bmm(p_tangent, v).baddbmm_(p, v_tangent))  # Ṗ v + P v̇
        ctx.save_for_backward(packed)
        ctx.rotary, ctx.arch, ctx.coupled, ctx.kernels = rotary, arch, coupled, kernels
        return merge_heads(out.unflatten(1, (packed.shape[1], arch.num_query_groups)))

    @staticmethod
    @once_differentiable
    def backward(ctx, adjoint: Tensor):
        (packed,) = ctx.saved_tensors
        heads = _unpack(packed, ctx.rotary, ctx.arch)
        adjoint = _split(adjoint, ctx.arch)  # [dŌ, Ō] as [2, n, r, s, d]
        # A query belongs to one block, which stores its adjoint; a key or value to many, which add to it.
        adjoints = _Heads(torch.empty_like(heads.query), torch.zeros_like(heads.key), torch.zeros_like(heads.value))
        back = _coupled_block if ctx.coupled else _uncoupled_block
        for block in _blocks(*heads.query.shape[1:4], packed.device):
            back(heads, adjoint, adjoints, block, ctx.kernels)
        return _pack(adjoints, packed.shape[1], ctx.rotary, ctx.arch), None, None, None, None


def _unpack(packed: Tensor, rotary: Rotary, arch: Architecture) -> _Heads:
    """The heads of packed [2, b, s, (H + 2 G) d]; contiguous, because every block multiplies slices of them."""
    query, key, value = split_heads(packed, arch)
    query = rotate(query, *rotary).flatten(1, 2).contiguous().mul_(arch.kv_channels**-0.5)
    return _Heads(query, rotate(key, *rotary).flatten(1, 2).contiguous(), value.flatten(1, 2).contiguous())


def _split(packed: Tensor, arch: Architecture) -> Tensor:
    """[2, b, s, H d] to contiguous [2, n, r, s, d]."""
    groups = arch.num_query_groups
    heads = packed.unflatten(-1, (groups, arch.num_attention_heads // groups, arch.kv_channels))
    return heads.movedim(2, 4).flatten(1, 2).contiguous()


def _pack(adjoints: _Heads, batch_size: int, rotary: Rotary, arch: Architecture) -> Tensor:
    """Adjoints of ``_unpack``'s results to that of its ``packed``: a rotation's adjoint turns back, hence -sin."""
    cos, sin = rotary
    shape = (batch_size, arch.num_query_groups)
    query = rotate(adjoints.query.mul_(arch.kv_channels**-0.5), cos, -sin).unflatten(1, shape)
    key = rotate(adjoints.key, cos, -sin)
    key, value = (t.unflatten(1, shape).movedim(-2, -3).flatten(-2) for t in (key, adjoints.value))  # [2, b, s, G d]
    return torch.cat((merge_heads(query), key, value), -1)


def _load(stack: Tensor, index: int, block: _Block) -> Tensor:
    """A block of ``stack`` [2, n, r, s, d] as [e, r i, d]: heads that share keys become rows of one product."""
    return stack[index, block.heads, :, block.first : block.last].flatten(1, 2)


def _store(stack: Tensor, index: int, block: _Block, rows: Tensor) -> None:
    """The inverse of ``_load``: write rows [e, r i, d]."""
    target = stack[index, block.heads, :, block.first : block.last]
    target.copy_(rows.view(target.shape))


def _probabilities(heads: _Heads, block: _Block, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """P and Ṗ [e, r i, j] of one block."""
    q, q_tangent = _load(heads.query, 0, block), _load(heads.query, 1, block)  # [e, r i, d]
    k, k_tangent = (heads.key[i][block.past].transpose(1, 2) for i in (0, 1))  # [e, d, j]
    scores_tangent = torch.bmm(q_tangent, k).baddbmm_(q, k_tangent)  # Ṡ; a future key's meets P = 0
    return kernels.softmax_pair(_without_future(torch.bmm(q, k), block), scores_tangent)


def _without_future(scores: Tensor, block: _Block) -> Tensor:
    """Scores [e, r i, j] with -inf where a key lies after its query, in place."""
    size = block.last - block.first
    future = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu_(1)
    scores.view(scores.shape[0], -1, size, block.last)[..., block.first :].masked_fill_(future, float("-inf"))
    return scores


def _coupled_block(heads: _Heads, adjoint: Tensor, adjoints: _Heads, block: _Block, kernels: Kernels) -> None:
    """Add one block's adjoints and their tangents to ``adjoints``; ``adjoint`` is [dŌ, Ō]."""
    p, p_tangent = _probabilities(heads, block, kernels)  # [e, r i, j]
    v, v_tangent = (heads.value[i][block.past].transpose(1, 2) for i in (0, 1))  # [e, d, j]
    bar, dot = _load(adjoint, 1, block), _load(adjoint, 0, block)  # Ō and dŌ [e, r i, d]
    adjoints.value[1][block.past].baddbmm_(p.transpose(1, 2), bar)  # v̄
    adjoints.value[0][block.past].baddbmm_(p.transpose(1, 2), dot).baddbmm_(p_tangent.transpose(1, 2), bar)  # dv̄
    m = torch.bmm(bar, v)  # M [e, r i, j]
    m_tangent = torch.bmm(dot, v).baddbmm_(bar, v_tangent)  # Ṁ
    n, n_tangent = kernels.softmax_backward(p, p_tangent, m, m_tangent)  # N and Ṅ
    _scores_backward(heads, adjoints, block, n, n_tangent, coupled=True)


def _uncoupled_block(heads: _Heads, adjoint: Tensor, adjoints: _Heads, block: _Block, kernels: Kernels) -> None:
    """Send two independent cotangents through one block's transposed Jacobian."""
    scores = torch.bmm(_load(heads.query, 0, block), heads.key[0][block.past].transpose(1, 2))
    p = kernels.softmax(_without_future(scores, block))  # [e, r i, j]
    v = heads.value[0][block.past].transpose(1, 2)  # [e, d, j]
    parts = []
    for index in (0, 1):
        cotangent = _load(adjoint, index, block)  # [e, r i, d]
        adjoints.value[index][block.past].baddbmm_(p.transpose(1, 2), cotangent)
        n = torch.bmm(cotangent, v).mul_(p)  # P M
        parts.append(n.addcmul_(p, n.sum(-1, keepdim=True), value=-1))  # N = P M - P Σ P M
    _scores_backward(heads, adjoints, block, parts[1], parts[0], coupled=False)


def _scores_backward(
    heads: _Heads, adjoints: _Heads, block: _Block, n: Tensor, n_tangent: Tensor, coupled: bool
) -> None:
    """q̄ and dq̄ stored, k̄ and dk̄ added, of N and Ṅ [e, r i, j]."""
    q, q_tangent = _load(heads.query, 0, block), _load(heads.query, 1, block)  # [e, r i, d]
    k, k_tangent = heads.key[0][block.past], heads.key[1][block.past]  # [e, j, d]
    _store(adjoints.query, 1, block, torch.bmm(n, k))
    q_dot = torch.bmm(n_tangent, k)
    _store(adjoints.query, 0, block, q_dot.baddbmm_(n, k_tangent) if coupled else q_dot)
    adjoints.key[1][block.past].baddbmm_(n.transpose(1, 2), q)
    k_dot = adjoints.key[0][block.past].baddbmm_(n_tangent.transpose(1, 2), q)
    if coupled:
        k_dot.baddbmm_(n.transpose(1, 2), q_tangent)
