"""Process groups of every layout, and errors that reach every rank."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from megatron_bliss.base import parallel
from megatron_bliss.config.platform import PlatformConfig
from tests.distributed import run_distributed
from tests.targets import grouped, layout


def describe(groups: parallel.Groups) -> dict:
    return {
        "sizes": tuple(groups.sizes.values()),
        "ranks": (
            groups.tensor_model_parallel_rank,
            groups.pipeline_model_parallel_rank,
            groups.data_parallel_rank,
        ),
        "replica": groups.model_parallel_ranks,
        "stages": (groups.is_first_pipeline_stage, groups.is_last_pipeline_stage),
        "main": groups.is_main,
    }


def test_a_lone_process_is_a_world_of_one():
    assert "RANK" not in os.environ
    with grouped(layout()) as groups:
        assert (groups.rank, groups.world_size, groups.local_rank, groups.device.type) == (0, 1, 0, "cpu")
        assert describe(groups) == {
            "sizes": (1, 1, 1),
            "ranks": (0, 0, 0),
            "replica": [0],
            "stages": (True, True),
            "main": True,
        }
        parallel.barrier(groups)
        assert parallel.all_gather_object("a", groups) == ["a"]
        with pytest.raises(ValueError, match="^too small$"), parallel.failing_together(groups):
            raise ValueError("too small")
    assert not dist.is_initialized()
    parallel.destroy()


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((2, 1), r"found 1 processes, expected a multiple of 2 .*tensor_model_parallel_size=2"),
        ((1, 3), r"found 1 processes, expected a multiple of 3 .*pipeline_model_parallel_size=3"),
        ((0, 1), "tensor_model_parallel_size=0"),
    ],
)
def test_a_layout_that_does_not_fit_the_world_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        parallel.initialize(PlatformConfig(), layout(*sizes), seed=1)
    assert not dist.is_initialized()


def raises(function) -> tuple[str, str]:
    try:
        function()
    except (RuntimeError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", ""


def fail_on_one_rank(groups: parallel.Groups, error: Exception, failing_rank: int) -> None:
    with parallel.failing_together(groups):
        if groups.rank == failing_rank:
            raise error


def check_four_ranks(rank: int, world_size: int) -> dict:
    outcome = {}
    for name, config in (("tensor", layout(2)), ("pipeline", layout(1, 2)), ("both", layout(2, 2))):
        with grouped(config) as groups:
            outcome[name] = describe(groups)
    assert dist.is_initialized()  # the group that was there before stays
    with grouped(layout(2)) as groups:
        outcome["largest"] = parallel.max_over_ranks(2**53 - rank, groups)
        outcome["main rank's"] = parallel.broadcast_object({"rank": rank}, groups)
        outcome["gathered"] = parallel.all_gather_object(rank * 10, groups)
        mine = torch.full((2, 3), float(rank))[:, :2]  # not contiguous
        outcome["of the pair"] = parallel.all_gather(mine, groups.tensor_model_parallel_group)[:, 0, 0].tolist()
        outcome["user's"] = raises(lambda: fail_on_one_rank(groups, ValueError("bad corpus"), 2))
        outcome["other"] = raises(lambda: fail_on_one_rank(groups, OSError(28, "No space left"), 3))
        outcome["none"] = raises(lambda: fail_on_one_rank(groups, ValueError(), -1))
        parallel.barrier(groups)
    return outcome


def test_four_ranks_agree_on_layouts_collectives_and_errors():
    ranks = run_distributed(check_four_ranks, 4)
    assert [outcome["tensor"]["ranks"] for outcome in ranks] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    assert [outcome["tensor"]["replica"] for outcome in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [outcome["pipeline"]["ranks"] for outcome in ranks] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert [outcome["pipeline"]["stages"] for outcome in ranks] == [(True, False)] * 2 + [(False, True)] * 2
    assert [outcome["both"]["ranks"] for outcome in ranks] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert [outcome["both"]["main"] for outcome in ranks] == [True, False, False, False]
    for rank, outcome in enumerate(ranks):
        assert outcome["largest"] == 2**53
        assert outcome["main rank's"] == {"rank": 0}
        assert outcome["gathered"] == [0, 10, 20, 30]
        assert outcome["of the pair"] == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert outcome["user's"] == ("ValueError", "rank 2: bad corpus")
        assert outcome["other"] == ("RuntimeError", "rank 3 failed with OSError: [Errno 28] No space left")
        assert outcome["none"] == ("", "")
