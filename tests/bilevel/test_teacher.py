"""The teacher gives every owner the single-process logits of its own samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_bliss.bilevel.teacher import TargetTeacher
from tests.distributed import run_distributed
from tests.targets import LLAMA, NEOX, VOCAB_SIZE, grouped, layout, make_target

COUNTS = {1: [8], 2: [5, 3], 4: [1, 4, 0, 3]}
"""Samples of each rank: uneven, and none on one."""
WIDTHS = [16, 11, 7, 14]


def owned_tokens(rank: int, world_size: int) -> torch.Tensor:
    tokens = torch.randint(VOCAB_SIZE, (8, 16), generator=torch.Generator().manual_seed(1))
    start = sum(COUNTS[world_size][:rank])
    width = WIDTHS[rank] if world_size > 1 else 16
    return tokens[start : start + COUNTS[world_size][rank], :width]


def teach(rank: int, world_size: int, cases: list) -> list[np.ndarray]:
    outcomes = []
    for config, architecture in cases:
        with grouped(config) as groups:
            target = make_target(config, groups, architecture)
            teacher = TargetTeacher(target, groups, VOCAB_SIZE, micro_batch_size=3)
            hidden_states, weight = teacher(owned_tokens(rank, world_size))
            assert not hidden_states.requires_grad and not weight.requires_grad
            assert weight.shape == (VOCAB_SIZE, architecture.hidden_size)
            outcomes.append((hidden_states @ weight.t()).numpy())
    return outcomes


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_gets_the_single_process_logits_of_its_samples(world_size):
    sizes = {
        2: [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False)],
        4: [(2, 1, False), (4, 1, False), (2, 2, False), (2, 2, True)],
    }
    cases = [(layout(*size), architecture) for size in sizes[world_size] for architecture in (NEOX, LLAMA)]
    interleaved = replace(layout(1, 2), virtual_pipeline_model_parallel_size=2)
    cases += [(interleaved, replace(architecture, num_layers=4)) for architecture in (NEOX, LLAMA)]
    cases = [(config, a) for config, a in cases if a.num_query_groups % config.tensor_model_parallel_size == 0]
    architectures = list(dict.fromkeys(architecture for _, architecture in cases))
    single = dict(zip(architectures, teach(0, 1, [(layout(), a) for a in architectures]), strict=True))
    start = 0
    for rank, outcomes in enumerate(run_distributed(teach, world_size, cases)):
        count = COUNTS[world_size][rank]
        for (config, architecture), logits in zip(cases, outcomes, strict=True):
            expected = single[architecture][start : start + count, : WIDTHS[rank]]
            assert logits.shape == expected.shape
            np.testing.assert_allclose(logits, expected, atol=2e-6, rtol=0, err_msg=str(config))
        start += count


def test_refresh_follows_the_targets_weights():
    with grouped(layout()) as groups:
        target = make_target(layout(), groups)
        teacher = TargetTeacher(target, groups, VOCAB_SIZE)
        before = teacher.output_weight.clone()
        with torch.no_grad():
            target[0].output_layer.weight.add_(1.0)
        teacher.refresh()
        assert torch.equal(teacher.output_weight, before + 1.0)
        assert torch.equal(teacher(owned_tokens(0, 1)).output_weight, before + 1.0)
