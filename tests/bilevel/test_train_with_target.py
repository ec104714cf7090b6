"""Bilevel steps with the KL to a megatron-core target give the same numbers at every parallel layout of the target."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_bliss.bilevel.teacher import TargetTeacher
from tests.bilevel.trainers import CONFIG, assert_same, make_trainer
from tests.distributed import run_distributed
from tests.targets import VOCAB_SIZE, grouped, layout, make_target

STEPS = 2
ALL = CONFIG.global_batch_size
SPLITS = ((0, ALL), (1, ALL), (3, ALL), (0, 1))
"""Micro-batch and global batch; that of one sample leaves whole replicas of the target without any."""


def steps(rank: int, world_size: int, sizes: list[tuple[int, int]]) -> dict[tuple, dict[str, np.ndarray]]:
    """Metrics and z after a few steps, for every layout of the target and every micro-batch split."""
    found = {}
    for tensor, pipeline in sizes:
        with grouped(layout(tensor, pipeline)) as groups:
            target = make_target(layout(tensor, pipeline), groups)
            teacher = TargetTeacher(target, groups, VOCAB_SIZE)
            for split, samples in SPLITS:
                config = dataclasses.replace(CONFIG, micro_batch_size=split, global_batch_size=samples)
                trainer = make_trainer(config, torch.float32, groups, target_teacher=teacher, vocab_size=VOCAB_SIZE)
                metrics = [trainer.step() for _ in range(STEPS)]
                found[tensor, pipeline, split, samples] = {
                    "metrics": np.array([[step[name] for name in sorted(step)] for step in metrics]),
                    "z": trainer.z.numpy(),
                    "kl": np.array([step["kl"] for step in metrics]),
                }
    return found


@pytest.mark.parametrize(("world_size", "sizes"), [(2, [(1, 1), (2, 1), (1, 2)]), (4, [(2, 2)])])
def test_steps_do_not_depend_on_the_targets_layout(world_size: int, sizes: list[tuple[int, int]]) -> None:
    alone = steps(0, 1, [(1, 1)])
    assert all((values["kl"] > 1e-3).all() for values in alone.values())  # else the target would play no part here
    for rank, found in enumerate(run_distributed(steps, world_size, sizes)):
        for (tensor, pipeline, split, samples), values in found.items():
            where = f"rank {rank} of {world_size}, TP {tensor}, PP {pipeline}, {samples} in micro-batches of {split}"
            assert_same(values, alone[1, 1, 0, samples], 2e-5, where)
