"""The split under a memory limit: monotone, as large as fits, and without effect on the numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_bliss.bilevel import memory
from megatron_bliss.bilevel.memory import GIB, StepShape, block_elements, keeps_graph, plan_step, step_bytes
from megatron_bliss.bilevel.micro_batch import MicroBatch
from megatron_bliss.bilevel.vector import ParameterVector, zeros
from megatron_bliss.bilevel.walk import DualWalk, Walk
from megatron_bliss.config.models import ModelConfig
from megatron_bliss.models.presets import resolve_architecture
from tests.bilevel.problems import language_model, lower_loss, random_batch
from tests.bilevel.trainers import ALONE, CONFIG, assert_same, make_trainer, run_steps

PYTHIA = resolve_architecture(ModelConfig(preset="pythia-31m"), 50304)
SHAPE = StepShape(PYTHIA, 1024)


def test_larger_steps_are_estimated_larger() -> None:
    base = step_bytes(SHAPE, 4, recompute=True)
    assert base < step_bytes(SHAPE, 8, recompute=True)
    assert base < step_bytes(dataclasses.replace(SHAPE, seq_length=2048), 4, recompute=True)
    assert base < step_bytes(SHAPE, 4, recompute=False)


@pytest.mark.parametrize("limit", [0.5, 0.6, 1.0, 4.0, 64.0])
def test_the_plan_is_the_largest_that_fits(limit: float) -> None:
    plan = plan_step(SHAPE, 16, limit)
    assert plan.estimated_bytes <= limit * GIB
    if plan.micro_batch_size < 16:
        assert step_bytes(SHAPE, plan.micro_batch_size + 1, recompute=True) > limit * GIB
    if limit == 64.0:
        assert plan.micro_batch_size == 16 and plan.recompute is None


def test_a_limit_below_one_sample_says_what_would_do() -> None:
    with pytest.raises(ValueError, match="expected at least 0.*for one sample of 1024 tokens"):
        plan_step(SHAPE, 4, 0.01)


def test_a_limit_changes_the_split_but_no_number() -> None:
    architecture = make_trainer(CONFIG, torch.float64, ALONE).proxy.architecture
    limit = step_bytes(StepShape(architecture, 9), 3, recompute=True) / GIB
    limited = dataclasses.replace(CONFIG, memory_limit_gib=limit)
    trainer = make_trainer(limited, torch.float64, ALONE)
    assert trainer.execution.micro_batch_size in (3, 4) and trainer.execution.recompute is True
    expected = run_steps(CONFIG, torch.float64, ALONE)
    assert_same(run_steps(limited, torch.float64, ALONE), expected, 1e-10, "memory limit")


@torch.no_grad()
def saved_elements(family: str, layers: int, *, dual: bool) -> int:
    """Elements that autograd keeps of one forward walk over 2 x 64 tokens, parameters left out."""
    model = language_model(family, width=64, ffn=192, layers=layers, dtype=torch.float32)
    micro = MicroBatch(model, lower_loss(random_batch(2, 64), torch.full((2,), 0.5)), compiled=False)
    vectors = {"vector": ParameterVector(model, torch.ones_like(zeros(model).flat))} if dual else {}
    scene = micro.scene(model, gradient=zeros(model), product=zeros(model), **vectors)
    held = [*model.parameters(), *(vectors["vector"].values() if dual else [])]
    parameters = {tensor.untyped_storage().data_ptr() for tensor in held}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size(), tensor  # kept, so no address twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (DualWalk if dual else Walk)(scene, keep=True).forward(micro.embed(scene, dual=dual))
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_a_blocks_graph_is_as_large_as_estimated(family: str, dual: bool) -> None:
    found = (saved_elements(family, 3, dual=dual) - saved_elements(family, 2, dual=dual)) / (2 * 64)
    architecture = language_model(family, width=64, ffn=192).architecture
    assert 0.75 < (1 + dual) * block_elements(architecture) / found < 1.3


def test_graphs_are_kept_while_they_are_small(monkeypatch) -> None:
    x, tokens = torch.zeros(1), 128
    size = 4 * PYTHIA.num_layers * block_elements(PYTHIA) * tokens
    monkeypatch.setattr(memory, "KEPT_BYTES", size)
    assert keeps_graph(PYTHIA, tokens, x, dual=False, recompute=None)
    assert not keeps_graph(PYTHIA, tokens + 1, x, dual=False, recompute=None)
    assert not keeps_graph(PYTHIA, tokens, x, dual=True, recompute=None)
    assert keeps_graph(PYTHIA, tokens, x, dual=True, recompute=False)
    assert not keeps_graph(PYTHIA, 1, x, dual=False, recompute=True)
