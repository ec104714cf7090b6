"""A rank of the largest examples, at their own layout: built without memory and without the other ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_bliss.base.parallel import Groups
from megatron_bliss.config.config import Config
from megatron_bliss.models.presets import resolve_architecture
from megatron_bliss.plan.plan import Machine, make_plan
from megatron_bliss.run.options import parse_options
from megatron_bliss.target.memory import chunk_weights, weight_count
from megatron_bliss.target.model import build_chunks
from tests.targets import grouped

EXAMPLES = Path(__file__).parents[2] / "examples"
GIB = 2**30


@contextmanager
def as_rank(rank: int, world_size: int, config: Config) -> Iterator[Groups]:
    """This process as one rank of many: torch's fake process group has all of them and moves nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with grouped(config.target, config.platform) as groups:
            yield groups
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "world_size", "held_gib"),
    # weights, fp32 gradients, fp32 weights and moments of a rank, by hand: 13.0e9 / 8 x 18 bytes; 69e9 / 32 x 18
    [("llama_13b_c4", 8, 27.3), ("llama_70b_c4", 32, 36.1)],
)
def test_a_rank_of_a_large_target_holds_what_is_planned(
    name: str, world_size: int, held_gib: float, tmp_path: Path, monkeypatch
) -> None:
    options = ["--config", str(EXAMPLES / name / "config.yaml"), "--run_folder", str(tmp_path / "run")]
    config, sizes = parse_options([*options, "--platform.device", "cpu"]), {}
    architecture = resolve_architecture(config.target, 32000)
    stages, tensor = config.target.pipeline_model_parallel_size, config.target.tensor_model_parallel_size
    monkeypatch.delitem(os.environ, "LOCAL_RANK", raising=False)
    for rank in (0, tensor - 1, *(stage * tensor for stage in range(1, stages)), world_size - 1):
        with as_rank(rank, world_size, config) as groups, torch.device("meta"):
            settings = {"seq_length": config.data.seq_length, "params_dtype": torch.bfloat16}
            target, stage = build_chunks(config.target, architecture, groups, **settings), rank // tensor
            assert groups.pipeline_model_parallel_rank == stage
            assert groups.tensor_model_parallel_rank == rank % tensor
            for number, chunk in enumerate(target):
                found = [parameter.numel() for parameter in chunk.parameters()]
                assert found == [weight.size for weight in chunk_weights(config.target, architecture, stage, number)]
                assert {parameter.device.type for parameter in chunk.parameters()} == {"meta"}
            sizes[stage] = sum(parameter.numel() for chunk in target for parameter in chunk.parameters())
            assert sizes[stage] == weight_count(config.target, architecture, stage)
    monkeypatch.chdir(tmp_path)  # where no corpus lies
    machine = Machine(world_size=world_size, device="h100", memory_gib=80.0)
    planned = make_plan(parse_options(options), machine, vocab_size=32000)["memory"]
    training = next(one for one in planned["stages"] if one["stage"] == "target training")
    assert planned["fits"] and training["parameters"] == 2 * sizes[training["pipeline_stage"]]
    held = training["parameters"] + training["gradients"] + training["optimizer"]
    assert held / GIB == pytest.approx(held_gib, rel=0.01)
