"""The frozen target's last hidden states, brought to the rank that owns the sample.

KL needs the target's distribution for samples that any rank of the world may own. Logits (tokens x vocabulary) are too
big to move, hidden states (tokens x width) are 25 to 50 times smaller: each model-parallel group runs the target over
the union of its members' samples and hands every member its own, together with a copy of the output matrix made once.
The member makes the logits as it needs them. Exact at every tensor- and pipeline-parallel size.

Shapes: b samples of this rank, s tokens, w width of the target, v vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_bliss.base.parallel import Groups, all_gather
from megatron_bliss.bilevel.head import Teacher
from megatron_bliss.target.model import Target, last_stage_hidden_states, output_weight

TEACHER_MICRO_BATCH = 8
"""Samples of one forward pass of the frozen target."""


class TargetTeacher:
    """The target as a teacher; every call is collective over the model-parallel group.

    With ``offload`` the target's weights lie in the host's memory between calls, for one too large to share the device
    with a walk; its output matrix stays, because every chunk of the head reads it.
    """

    def __init__(
        self,
        target: Target,
        groups: Groups,
        vocab_size: int,
        micro_batch_size: int = TEACHER_MICRO_BATCH,
        *,
        offload: bool = False,
    ) -> None:
        self.target, self.groups, self.vocab_size = target, groups, vocab_size
        self.micro_batch_size, self.offload = micro_batch_size, offload
        self.refresh()

    def refresh(self) -> None:
        """Copy the output matrix [v, w] again, after the target's weights have changed."""
        with self._on_device():
            self.output_weight = output_weight(self.target, self.groups, self.vocab_size)

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """The target on this rank's device, and back in the host's memory afterwards where it is offloaded."""
        chunks = self.target if self.offload else []
        for chunk in chunks:
            chunk.to(self.groups.device)
        try:
            yield
        finally:
            for chunk in chunks:
                chunk.to("cpu")

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Teacher:
        """tokens int64 [b, s] of this rank, right padded -> hidden states [b, s, w] and output matrix [v, w].

        Ranks may bring different numbers of samples, none included, and different widths.
        """
        union, rows = self._gather(tokens.to(self.groups.device))
        with self._on_device():
            hidden_states = last_stage_hidden_states(self.target, union, self.groups, self.micro_batch_size)
        mine = self._hand_out(hidden_states, union.shape[1], rows)
        return Teacher(mine[:, : tokens.shape[1]], self.output_weight)

    def _gather(self, tokens: Tensor) -> tuple[Tensor, list[slice]]:
        """All members' tokens [sum of b, widest s], and which rows are whose, by rank in the model-parallel group."""
        group = self.groups.model_parallel_group
        shapes = all_gather(torch.tensor(tokens.shape, device=tokens.device), group)
        counts, widths = shapes.t().tolist()
        ends = torch.tensor(counts).cumsum(0).tolist()
        rows = [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]
        if not sum(counts):
            return tokens, rows
        padded = F.pad(tokens, (0, max(widths) - tokens.shape[1], 0, max(counts) - tokens.shape[0]))
        gathered = all_gather(padded, group)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)]), rows

    def _hand_out(self, hidden_states: Tensor | None, seq_length: int, rows: list[slice]) -> Tensor:
        """From the last stage, which holds the union, to every stage of the same tensor-parallel rank its rows."""
        groups = self.groups
        owned = {world_rank: rows[i] for i, world_rank in enumerate(groups.model_parallel_ranks)}
        own = owned[groups.rank]
        if hidden_states is None:
            config = self.target[0].config
            shape = (own.stop - own.start, seq_length, config.hidden_size)
            received = torch.empty(shape, dtype=config.params_dtype, device=groups.device)
            if received.numel():
                dist.recv(received, src=groups.pipeline_ranks[-1], group=groups.pipeline_model_parallel_group)
            return received
        for stage in groups.pipeline_ranks[:-1]:
            part = hidden_states[owned[stage]].contiguous()
            if part.numel():
                dist.send(part, dst=stage, group=groups.pipeline_model_parallel_group)
        return hidden_states[own]
