"""Causal attention on dual numbers, in blocks of samples, heads and queries.

With scores S = q kᵀ (q scaled and rotated), P = softmax(S), O = P v and tangents marked by a dot:

    Ṡ = q̇ kᵀ + q k̇ᵀ          Ṗ = P (Ṡ - Σ P Ṡ)          Ȯ = Ṗ v + P v̇

and back, Ō the adjoint of O and Ŏ that adjoint's tangent (sums run over keys):

    M = Ō vᵀ                   N = P (M - m),  m = Σ P M
    Ṁ = Ŏ vᵀ + Ō v̇ᵀ            Ṅ = Ṗ (M - m) + P (Ṁ - ṁ),  ṁ = Σ (Ṗ M + P Ṁ)
    v̄ = Pᵀ Ō, and its tangent Ṗᵀ Ō + Pᵀ Ŏ;     q̄ = N k, and Ṅ k + N k̇;     k̄ = Nᵀ q, and Ṅᵀ q + Nᵀ q̇

No matrix of all queries by all keys of the whole batch exists: a block holds at most ``BLOCK_ELEMENTS`` scores (or one
group's), future keys are skipped, and the backward pass makes P and Ṗ again. Stacks hold [value, tangent] going forward
and [tangent of the adjoint, adjoint] going back, as in dual.py.

Shapes: n samples times query groups, r heads of a group, s sequence, d channels of a head.
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


class _Block(NamedTuple):
    """Entries ``heads`` of n, queries ``first`` to ``last``, keys 0 to ``last``."""

    heads: slice
    first: int
    last: int


def _blocks(count: int, per_group: int, length: int, device: torch.device) -> Iterator[_Block]:
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
        query, key, value = _unpack(packed, rotary, arch)
        out = torch.empty_like(query)
        for block in _blocks(*query.shape[1:4], packed.device):
            p, p_tangent = _probabilities(query, key, block, kernels)
            v, v_tangent = value[0, block.heads, : block.last], value[1, block.heads, : block.last]
            _store(out, 0, block, torch.bmm(p, v))
            _store(out, 1, block, torch.bmm(p_tangent, v).baddbmm_(p, v_tangent))
        ctx.save_for_backward(packed)
        ctx.rotary, ctx.arch, ctx.coupled, ctx.kernels = rotary, arch, coupled, kernels
        return merge_heads(out.unflatten(1, (packed.shape[1], arch.num_query_groups)))

    @staticmethod
    @once_differentiable
    def backward(ctx, adjoint: Tensor):
        (packed,) = ctx.saved_tensors
        query, key, value = _unpack(packed, ctx.rotary, ctx.arch)
        adjoint = _split(adjoint, ctx.arch)
        grads = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        walk = _coupled_block if ctx.coupled else _uncoupled_block
        for block in _blocks(*query.shape[1:4], packed.device):
            walk(query, key, value, adjoint, grads, block, ctx.kernels)
        return _pack(*grads, packed, ctx.rotary, ctx.arch), None, None, None, None


def _unpack(packed: Tensor, rotary: Rotary, arch: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated, scaled queries [2, n, r, s, d], rotated keys [2, n, s, d], values [2, n, s, d]; contiguous."""
    query, key, value = split_heads(packed, arch)
    query = rotate(query, *rotary).flatten(1, 2).contiguous().mul_(arch.kv_channels**-0.5)
    return query, rotate(key, *rotary).flatten(1, 2).contiguous(), value.flatten(1, 2).contiguous()


def _split(packed: Tensor, arch: Architecture) -> Tensor:
    """[2, b, s, H d] to contiguous [2, n, r, s, d]."""
    groups = arch.num_query_groups
    heads = packed.unflatten(-1, (groups, arch.num_attention_heads // groups, arch.kv_channels))
    return heads.movedim(2, 4).flatten(1, 2).contiguous()


def _pack(query: Tensor, key: Tensor, value: Tensor, packed: Tensor, rotary: Rotary, arch: Architecture) -> Tensor:
    """Adjoints of ``_unpack``'s results to the adjoint of ``packed``."""
    cos, sin = rotary
    shape = (packed.shape[1], arch.num_query_groups)
    query = rotate(query.mul_(arch.kv_channels**-0.5), cos, -sin).unflatten(1, shape)
    key, value = (t.unflatten(1, shape).movedim(-2, -3).flatten(-2) for t in (rotate(key, cos, -sin), value))
    return torch.cat((merge_heads(query), key, value), -1)


def _load(stack: Tensor, index: int, block: _Block) -> Tensor:
    """A block of ``stack`` [2, n, r, s, d] as [heads of the block, r queries of the block, d]."""
    return stack[index, block.heads, :, block.first : block.last].flatten(1, 2)


def _store(stack: Tensor, index: int, block: _Block, rows: Tensor) -> None:
    target = stack[index, block.heads, :, block.first : block.last]
    target.copy_(rows.view(target.shape))


def _probabilities(query: Tensor, key: Tensor, block: _Block, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """P and Ṗ [heads, r queries, keys] of one block."""
    q, q_tangent = _load(query, 0, block), _load(query, 1, block)
    k, k_tangent = (key[i, block.heads, : block.last].transpose(1, 2) for i in (0, 1))
    scores_tangent = torch.bmm(q_tangent, k).baddbmm_(q, k_tangent)
    return kernels.softmax_pair(_without_future(torch.bmm(q, k), block), scores_tangent)


def _without_future(scores: Tensor, block: _Block) -> Tensor:
    """Scores [n, r queries, keys] with -inf where a key lies after its query, in place."""
    size = block.last - block.first
    future = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu_(1)
    scores.view(scores.shape[0], -1, size, block.last)[..., block.first :].masked_fill_(future, float("-inf"))
    return scores


def _coupled_block(query, key, value, adjoint, grads, block: _Block, kernels: Kernels) -> None:
    """Add one block's adjoints and their tangents to ``grads`` (queries, keys, values)."""
    p, p_tangent = _probabilities(query, key, block, kernels)
    past = block.heads, slice(block.last)
    v, v_tangent = (value[i][past].transpose(1, 2) for i in (0, 1))
    bar, dot = _load(adjoint, 1, block), _load(adjoint, 0, block)
    grads[2][1][past].baddbmm_(p.transpose(1, 2), bar)
    grads[2][0][past].baddbmm_(p.transpose(1, 2), dot).baddbmm_(p_tangent.transpose(1, 2), bar)
    m = torch.bmm(bar, v)
    m_tangent = torch.bmm(dot, v).baddbmm_(bar, v_tangent)
    n, n_tangent = kernels.softmax_backward(p, p_tangent, m, m_tangent)
    _scores_backward(query, key, grads, block, n, n_tangent, coupled=True)


def _uncoupled_block(query, key, value, adjoint, grads, block: _Block, kernels: Kernels) -> None:
    """Send two independent cotangents through one block's transposed Jacobian."""
    past = block.heads, slice(block.last)
    scores = torch.bmm(_load(query, 0, block), key[0][past].transpose(1, 2))
    p = kernels.softmax(_without_future(scores, block))
    v = value[0][past].transpose(1, 2)
    parts = []
    for index in (0, 1):
        cotangent = _load(adjoint, index, block)
        grads[2][index][past].baddbmm_(p.transpose(1, 2), cotangent)
        n = torch.bmm(cotangent, v).mul_(p)
        parts.append(n.addcmul_(p, n.sum(-1, keepdim=True), value=-1))
    _scores_backward(query, key, grads, block, parts[1], parts[0], coupled=False)


def _scores_backward(query, key, grads, block: _Block, n: Tensor, n_tangent: Tensor, coupled: bool) -> None:
    """q̄ = N k, k̄ = Nᵀ q, and their tangents."""
    past = block.heads, slice(block.last)
    q, q_tangent = _load(query, 0, block), _load(query, 1, block)
    k, k_tangent = key[0][past], key[1][past]
    _store(grads[0], 1, block, torch.bmm(n, k))
    q_dot = torch.bmm(n_tangent, k)
    _store(grads[0], 0, block, q_dot.baddbmm_(n, k_tangent) if coupled else q_dot)
    grads[1][1][past].baddbmm_(n.transpose(1, 2), q)
    k_dot = grads[1][0][past].baddbmm_(n_tangent.transpose(1, 2), q)
    if coupled:
        k_dot.baddbmm_(n.transpose(1, 2), q_tangent)
