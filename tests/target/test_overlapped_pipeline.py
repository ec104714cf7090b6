"""The exchanges of an interleaved pipeline as a GPU machine makes them: one by one and waited for later.

NCCL takes a send without waiting for its receiver; gloo does not, which is why CPU runs exchange in batches. Here
gloo's sends are of copies that nobody waits for, so that megatron-core's overlapped schedule runs, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist

from megatron_bliss.base.parallel import Groups
from megatron_bliss.config.models import TargetConfig
from megatron_bliss.target.loss import evaluate_loss
from megatron_bliss.target.model import build_target
from megatron_bliss.target.sequences import MicroBatch
from megatron_bliss.target.trainer import TargetTrainer
from tests.distributed import run_distributed
from tests.targets import NEOX, PRETRAINING, SEQ_LENGTH, VOCAB_SIZE, grouped, make_batches

INTERLEAVED = TargetConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
STEPS = 3


class _Started:
    """A send that is on its way: like NCCL's, it holds nobody up."""

    def wait(self) -> None:
        pass


@contextlib.contextmanager
def sends_that_do_not_wait() -> Iterator[list]:
    """Every send a copy; gives the list of those made. At the end all have been received."""
    original, sent = dist.isend, []

    def isend(tensor: torch.Tensor, dst: int, group: dist.ProcessGroup) -> _Started:
        copied = tensor.detach().clone()
        sent.append((original(copied, dst, group), copied))
        return _Started()

    with mock.patch.object(dist, "isend", isend):
        yield sent
    for work, _ in sent:
        work.wait()


def micro_batches(count: int) -> Iterator[MicroBatch]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        tokens = torch.randint(VOCAB_SIZE, (PRETRAINING.micro_batch_size, SEQ_LENGTH), generator=generator)
        yield MicroBatch(tokens, tokens.roll(-1, 1), torch.ones(tokens.shape))


def curve(groups: Groups, overlapped: bool) -> list[float]:
    """Losses and gradient norms of a few steps, and the loss of an evaluation."""
    sizes = dataclasses.replace(NEOX, num_layers=4)
    target = build_target(INTERLEAVED, sizes, groups, seq_length=SEQ_LENGTH, params_dtype=torch.float32, seed=3)
    for chunk in target:
        chunk.config.overlap_p2p_comm, chunk.config.batch_p2p_comm = overlapped, not overlapped
    trainer = TargetTrainer(target, PRETRAINING, groups, seq_length=SEQ_LENGTH, total_iterations=10)
    steps = []
    for _ in range(STEPS):
        step = trainer.step(micro_batches(trainer.num_micro_batches), lambda *_: True)
        steps += [step.loss, step.grad_norm]
    return [*steps, evaluate_loss(target, make_batches(), groups)]


def on_both_paths(rank: int, world_size: int) -> tuple[list[float], list[float], int]:
    with grouped(INTERLEAVED) as groups:
        batched = curve(groups, overlapped=False)
        with sends_that_do_not_wait() as sent:
            overlapped = curve(groups, overlapped=True)
        return batched, overlapped, len(sent)


def test_overlapped_exchanges_bring_the_same_numbers() -> None:
    for batched, overlapped, sent in run_distributed(on_both_paths, 2):
        assert overlapped == batched and sent > 0
        assert batched[-3] < batched[0]  # the same micro-batches every time
