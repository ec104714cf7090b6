"""The target's training: the same curve at every parallel layout, and after a kill; clear errors."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bliss.base import checkpoint
from megatron_bliss.base.parallel import barrier
from megatron_bliss.config.models import TargetConfig
from megatron_bliss.config.output import CheckpointConfig
from megatron_bliss.config.platform import PlatformConfig
from megatron_bliss.config.training import OptimizerConfig
from megatron_bliss.target.checkpoint import save_target
from megatron_bliss.target.loss import evaluate_loss
from megatron_bliss.target.model import output_weight
from megatron_bliss.target.setup import load_target
from tests.distributed import run_distributed
from tests.targets import (
    LLAMA,
    LOGGING,
    NEOX,
    PRETRAINING,
    SEQ_LENGTH,
    VOCAB_SIZE,
    evaluator,
    grouped,
    last_hidden_states,
    layout,
    make_batches,
    make_corpus,
    make_target,
    segment_of,
    setup_of,
    train,
    without_times,
    written,
)

STEPS = int(os.environ.get("CURVE_STEPS", "20"))
"""Iterations of the curves that are compared over layouts: CURVE_STEPS=50 pytest ... for longer ones."""


def curve(entries: list[dict], name: str) -> np.ndarray:
    return np.array([entry[name] for entry in entries if name in entry])


def run_layouts(rank: int, world_size: int, prefix: str, folder: str, cases: list[tuple]) -> list[tuple]:
    """Train each (options of the target, architecture, options of the training) and evaluate it."""
    outcomes = []
    for number, (target, architecture, training) in enumerate(cases):
        config = TargetConfig(**target)
        with grouped(config) as groups:
            result, entries = train(
                setup_of(groups, config, architecture),
                segment_of(prefix, STEPS),
                Path(folder) / f"layout{world_size}_{number}",
                config=replace(PRETRAINING, **training),
                saving=CheckpointConfig(save_interval=1000),
                evaluate=evaluator(groups),
            )
            losses = [point.losses["held_out"] for point in result.evaluations]
        outcomes.append((curve(entries, "loss"), curve(entries, "grad_norm"), losses))
    return outcomes


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture(scope="module")
def single(prefix, tmp_path_factory) -> dict:
    """One process: the curves that every layout has to give."""
    folder = str(tmp_path_factory.mktemp("single"))
    outcomes = run_layouts(0, 1, prefix, folder, [({}, NEOX_4, {}), ({}, LLAMA_4, {}), *RECOMPUTED])
    compare(dict(zip((NEOX_4, LLAMA_4), outcomes[:2], strict=True)), RECOMPUTED, [outcomes[2:]])
    return dict(zip((NEOX_4, LLAMA_4), outcomes[:2], strict=True))


NEOX_4, LLAMA_4 = replace(NEOX, num_layers=4), replace(LLAMA, num_layers=4)  # enough for two chunks on two ranks
TENSOR, PIPELINE = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SEQUENCE, INTERLEAVED = {**TENSOR, "sequence_parallel": True}, {**PIPELINE, "virtual_pipeline_model_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 2}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block"}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
REPLICATED = {"use_distributed_optimizer": False}
OVERLAPPED = {"overlap_grad_reduce": True, "overlap_param_gather": True}
RECOMPUTED = [(FULL, NEOX_4, {}), (BLOCK, LLAMA_4, {}), (SELECTIVE, NEOX_4, {}), (SELECTIVE, LLAMA_4, {})]


def compare(single: dict, cases: list[tuple], ranks: list[list[tuple]]) -> None:
    for case, (loss, grad_norm, losses) in zip(cases, ranks[0], strict=True):
        expected_loss, expected_norm, expected_losses = single[case[1]]
        assert len(loss) == STEPS
        np.testing.assert_allclose(loss, expected_loss, atol=1e-4, rtol=0, err_msg=str(case))
        np.testing.assert_allclose(grad_norm, expected_norm, rtol=1e-4, err_msg=str(case))
        np.testing.assert_allclose(losses, expected_losses, atol=1e-4, rtol=0, err_msg=str(case))
    for outcomes in ranks[1:]:  # evaluations are the same numbers on every rank
        assert [outcome[2] for outcome in outcomes] == [outcome[2] for outcome in ranks[0]]


def test_one_process_learns(single):
    for loss, _, losses in single.values():
        assert loss[0] == pytest.approx(math.log(VOCAB_SIZE), abs=0.2)
        assert loss[-1] < loss[0] - 0.5
        assert len(losses) == STEPS // 7 + (STEPS % 7 > 0)  # every 7 iterations, and at the end


def test_two_ranks_give_the_single_process_curve(single, prefix, tmp_path):
    cases = [
        (TENSOR, LLAMA_4, {}),
        ({**SEQUENCE, **FULL}, NEOX_4, {}),
        ({**SEQUENCE, **SELECTIVE}, LLAMA_4, REPLICATED),
        (PIPELINE, NEOX_4, {}),
        (INTERLEAVED, LLAMA_4, {}),
        ({**INTERLEAVED, **FULL, "recompute_num_layers": 1}, NEOX_4, REPLICATED),
        ({}, NEOX_4, OVERLAPPED),
        ({}, LLAMA_4, {**REPLICATED, "overlap_grad_reduce": True}),
        ({}, NEOX_4, {}),
    ]
    compare(single, cases, run_distributed(run_layouts, 2, prefix, str(tmp_path), cases))


def test_four_ranks_give_the_single_process_curve(single, prefix, tmp_path):
    cases = [
        ({**TENSOR, **PIPELINE}, NEOX_4, {}),
        ({**SEQUENCE, **INTERLEAVED, **SELECTIVE}, LLAMA_4, {}),
        (INTERLEAVED, NEOX_4, OVERLAPPED),
    ]
    compare(single, cases, run_distributed(run_layouts, 4, prefix, str(tmp_path), cases))


class Killed(Exception):
    pass


def kill_at(iteration: int, groups):
    """An evaluation that stops the run, as a kill would, at one iteration."""
    measure, seen = evaluator(groups), []

    def evaluate(target):
        seen.append(None)
        if 7 * len(seen) == iteration:
            raise Killed
        return measure(target)

    return evaluate


def interrupt_and_resume(
    rank: int, world_size: int, prefix: str, folder: str, config, platform, architecture=NEOX, training=PRETRAINING
) -> tuple:
    """(uninterrupted, resumed) evaluations and metrics, and whether the saved states are the same bits."""
    runs = []
    with grouped(config, platform) as groups:
        for name in ("whole", "killed"):
            setup, logging = setup_of(groups, config, architecture, platform), replace(LOGGING, log_interval=3)
            parts = (setup, segment_of(prefix), Path(folder) / name)
            start = partial(train, *parts, config=training, logging=logging)
            if name == "killed":
                with pytest.raises(Killed):
                    start(evaluate=kill_at(14, groups))
                path = checkpoint.latest(Path(folder) / name / "segment")
                assert path.name == "step_00000010"
                barrier(groups)  # so that no rank looks while the next lines write
                if groups.is_main:  # what a kill in the middle of a save leaves, under both names it may have
                    shutil.copytree(path, path.parent / ".step_00000015.tmp")
                    shutil.copytree(path, path.parent / "step_00000015")
                    (path.parent / "step_00000015" / "manifest.json").unlink()
            runs.append(start(evaluate=evaluator(groups)))
        (whole, whole_entries), (resumed, resumed_entries) = runs
        same = len({written(result.checkpoint) for result in (whole, resumed)}) == 1
        leftovers = sorted(path.name for path in resumed.checkpoint.parent.glob(".*"))
    return whole.evaluations, resumed.evaluations, whole_entries, resumed_entries, same, leftovers


def check_resumed(outcome: tuple) -> None:
    whole, resumed, whole_entries, resumed_entries, same, leftovers = outcome
    assert whole == resumed and len(whole) == 3
    assert without_times(whole_entries) == without_times(resumed_entries)
    assert same
    assert leftovers == []


def test_a_killed_run_goes_on_bit_for_bit(prefix, tmp_path):
    check_resumed(interrupt_and_resume(0, 1, prefix, str(tmp_path), layout(), PlatformConfig()))


def resume_cases(rank: int, world_size: int, prefix: str, folder: str, cases: list[tuple]) -> list[tuple]:
    return [
        interrupt_and_resume(rank, world_size, prefix, str(Path(folder) / str(number)), *case)
        for number, case in enumerate(cases)
    ]


def test_killed_runs_on_two_ranks_go_on_bit_for_bit(prefix, tmp_path):
    """bf16 over data-parallel ranks whose weights are gathered late, and an interleaved pipeline."""
    cases = [
        (layout(), PlatformConfig(params_dtype="bf16"), NEOX, replace(PRETRAINING, **OVERLAPPED)),
        (TargetConfig(**INTERLEAVED), PlatformConfig(), LLAMA_4),
    ]
    ranks = run_distributed(resume_cases, 2, prefix, str(tmp_path), cases)
    for number, outcome in enumerate(ranks[0]):
        check_resumed(outcome)
        assert all(rank[number][4] for rank in ranks)


def test_a_finished_segment_is_not_trained_again(prefix, tmp_path):
    with grouped(layout()) as groups:
        go = partial(train, setup_of(groups), segment_of(prefix, 6), tmp_path, evaluate=evaluator(groups))
        first, entries = go()
        again, entries_again = go()
    assert again.evaluations == first.evaluations and entries_again == entries
    assert again.evaluations[-1].tokens == 6 * 8 * SEQ_LENGTH and again.flops == first.flops > 0


def test_a_segment_goes_on_where_the_one_before_ended(prefix, tmp_path):
    """Warm-up and a second segment on the same schedule; the second one's data begin anew."""
    with grouped(layout()) as groups:
        setup = setup_of(groups)
        warmup, _ = train(setup, segment_of(prefix, 6, total=12), tmp_path / "a")
        segment = segment_of(prefix, 12, first=6, start=warmup.checkpoint)
        second, entries = train(setup, segment, tmp_path / "b", evaluate=evaluator(groups))
        twin, twin_entries = train(setup, segment, tmp_path / "c", evaluate=evaluator(groups))
        with pytest.raises(ValueError, match="found iteration 6 in checkpoint .*, expected 7"):
            train(setup, replace(segment, first_iteration=7), tmp_path / "d")
        loss = evaluate_loss(load_target(second.checkpoint, setup), make_batches(), groups)
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 7))
    assert curve(entries, "lr")[0] < 1e-2 and curve(entries, "lr")[-1] < curve(entries, "lr")[0]  # cosine, not warm-up
    assert second.evaluations[-1] == (12, 12 * 8 * SEQ_LENGTH, {"held_out": loss})
    assert twin.evaluations == second.evaluations  # two segments of one process share nothing
    assert without_times(twin_entries) == without_times(entries)


def test_evaluate_loss_is_the_mean_over_labelled_tokens():
    with grouped(layout()) as groups:
        target = make_target(layout(), groups)
        total, count = 0.0, 0
        for batch in make_batches():
            hidden_states = last_hidden_states(target, batch.tokens, groups).double()
            weight = output_weight(target, groups, VOCAB_SIZE).double()
            log_p = (hidden_states @ weight.t())[:, :-1].log_softmax(-1)
            of_labels = log_p.gather(-1, batch.tokens[:, 1:, None])[..., 0][batch.label_mask[:, 1:]]
            total, count = total - of_labels.sum().item(), count + of_labels.numel()
        assert evaluate_loss(target, make_batches(), groups) == pytest.approx(total / count, abs=1e-6)
        unlabelled = [replace(batch, label_mask=torch.zeros_like(batch.label_mask)) for batch in make_batches()]
        with pytest.raises(ValueError, match="no labelled token"):
            evaluate_loss(target, unlabelled, groups)


def diverge(rank: int, world_size: int, prefix: str, folder: str) -> tuple[str, bool]:
    config = layout(tensor=world_size)
    training = replace(PRETRAINING, optimizer=OptimizerConfig(lr=1e30, clip_grad=0.0))
    with grouped(config) as groups, pytest.raises(RuntimeError) as error:
        train(setup_of(groups, config), segment_of(prefix), Path(folder) / "run", config=training)
    return str(error.value), checkpoint.latest(Path(folder) / "run" / "segment") is None


def test_a_loss_that_is_not_finite_stops_every_rank(prefix, tmp_path):
    outcomes = run_distributed(diverge, 2, prefix, str(tmp_path))
    for message, nothing_saved in outcomes:
        assert "expected finite numbers" in message and "pretraining.optimizer.lr" in message
        assert nothing_saved


def optimizer(**changes) -> dict:
    return {"optimizer": replace(PRETRAINING.optimizer, **changes)}


@pytest.mark.parametrize(
    "of, changes, message",
    [
        ("config", {"global_batch_size": 7}, r"global_batch_size=7, expected a multiple of 2"),
        ("segment", {"first_iteration": 20}, "from iteration 20 to 20"),
        ("setup", {"seq_length": 10**6}, r"tokens in .*, expected more than data.seq_length=1000000"),
        ("config", optimizer(lr_warmup_iters=20), "lr_warmup_iters=20, expected less than the run's 20"),
        ("config", optimizer(lr_decay_style="WSD"), "lr_wsd_decay_iters=0 with lr_decay_style=WSD, expected 1 to 17"),
        ("config", {"overlap_param_gather": True}, "overlap_param_gather without"),
        ("config", {"loss_spike_factor": 0.5}, "loss_spike_factor=0.5, expected more than 1"),
        ("config", optimizer(min_lr=1.0), "min_lr=1.0"),
        (
            "setup",
            {"architecture": replace(NEOX, vocab_size=50)},
            "found token id [5-9][0-9] in .*, expected ids below",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(prefix, tmp_path, of, changes, message):
    with grouped(layout()) as groups:
        records = {"setup": setup_of(groups), "segment": segment_of(prefix), "config": PRETRAINING}
        records[of] = replace(records[of], **changes)
        with pytest.raises(ValueError, match=message):
            train(records["setup"], records["segment"], tmp_path, config=records["config"])


def test_another_index_under_the_same_name_is_noticed(tmp_path):
    """megatron-core's cache key does not look inside the index."""
    prefix = make_corpus(tmp_path / "corpus", seed=1)
    with grouped(layout()) as groups:
        setup, segment = setup_of(groups), segment_of(prefix, 5, total=9)
        train(setup, segment, tmp_path / "run")
        make_corpus(tmp_path / "corpus", seed=2)
        with pytest.raises(ValueError, match="another index"):
            train(setup, segment_of(prefix, 9), tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "segment" / "step_00000005")
        _, fresh = train(setup, segment, tmp_path / "other")
        _, rebuilt = train(setup, segment, tmp_path / "run")
    assert without_times(rebuilt) == without_times(fresh)


def test_training_starts_from_a_checkpoint_of_weights_alone(prefix, tmp_path):
    with grouped(layout()) as groups:
        path = save_target(tmp_path / "weights", 0, make_target(layout(), groups, seed=7), groups, shared={})
        found, _ = train(setup_of(groups), segment_of(prefix, 4, start=path), tmp_path / "from")
        expected, _ = train(setup_of(groups, seed=7), segment_of(prefix, 4), tmp_path / "drawn")
        assert written(found.checkpoint) == written(expected.checkpoint)


def test_another_padding_of_the_vocabulary_is_the_same_model(prefix, tmp_path):
    """128 rows, 104 and 128 again: padding is zero and is trained by nobody."""
    with grouped(layout()) as groups:
        setups = {n: setup_of(groups, replace(layout(), make_vocab_size_divisible_by=n)) for n in (128, 8, 4)}
        whole, _ = train(setups[128], segment_of(prefix, 6), tmp_path / "whole")
        for divisible_by, last in ((128, 2), (8, 4), (128, 6)):
            mixed, _ = train(setups[divisible_by], segment_of(prefix, last, total=6), tmp_path / "mixed")
        losses = []
        for path, divisible_by in ((whole.checkpoint, 128), (mixed.checkpoint, 128), (mixed.checkpoint, 4)):
            losses.append(evaluate_loss(load_target(path, setups[divisible_by]), make_batches(), groups))
    np.testing.assert_allclose(losses, losses[0], rtol=0, atol=1e-5)


def test_an_fp32_checkpoint_goes_on_in_bf16(prefix, tmp_path):
    with grouped(layout()) as groups:
        whole, _ = train(setup_of(groups), segment_of(prefix, 8), tmp_path / "whole", evaluate=evaluator(groups))
        for dtype, last in (("fp32", 4), ("bf16", 8)):
            setup = setup_of(groups, platform=PlatformConfig(params_dtype=dtype))
            segment = segment_of(prefix, last, total=8)
            mixed, _ = train(setup, segment, tmp_path / "mixed", evaluate=evaluator(groups))
    found, expected = (result.evaluations[-1].losses["held_out"] for result in (mixed, whole))
    assert found == pytest.approx(expected, abs=0.03)


def test_other_sizes_than_the_checkpoint_are_refused(prefix, tmp_path):
    with grouped(layout()) as groups:
        train(setup_of(groups), segment_of(prefix, 4), tmp_path)
        changes = {
            r"found decoder.layers.0.mlp.linear_fc1.bias of shape \(64,\)": {"ffn_hidden_size": 128},
            r"found decoder.layers.2.input_layernorm.bias of shape None in .*, expected \(32,\)": {"num_layers": 3},
            r"found decoder.layers.1.input_layernorm.bias of shape \(32,\) in .*, expected None": {"num_layers": 1},
            r"found a vocabulary of 100 tokens in checkpoint .*, expected 101": {"vocab_size": 101},
        }
        for message, change in changes.items():
            with pytest.raises(ValueError, match=message):
                train(setup_of(groups, architecture=replace(NEOX, **change)), segment_of(prefix, 5), tmp_path)
