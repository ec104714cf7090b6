"""A checkpoint saved at one parallel layout goes on at another as if nothing had happened."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bliss.base import checkpoint
from megatron_bliss.base.metrics import MetricsLogger
from megatron_bliss.config.output import CheckpointConfig
from megatron_bliss.config.platform import PlatformConfig
from megatron_bliss.models.loop import Bookkeeping, run_steps
from megatron_bliss.target.loss import evaluate_loss
from megatron_bliss.target.setup import load_target
from tests.bilevel.trainers import CONFIG, make_trainer
from tests.distributed import run_distributed
from tests.targets import (
    LLAMA,
    LOGGING,
    NEOX,
    PRETRAINING,
    grouped,
    layout,
    make_batches,
    make_corpus,
    segment_of,
    setup_of,
    train,
)

SAVED, STOPPED, WHOLE = 6, 7, 12


class Stopped(Exception):
    pass


def curve(entries: list[dict]) -> np.ndarray:
    return np.array([[entry["step"], entry["loss"], entry["grad_norm"]] for entry in entries if "loss" in entry])


def go_on(rank: int, world_size: int, prefix: str, cases: list[tuple]) -> list:
    """Train (or go on) in each folder: (folder, tensor, pipeline, architecture, distributed optimizer, dtype)."""
    outcomes = []
    for folder, tensor, pipeline, architecture, distributed_optimizer, dtype in cases:
        config, platform = layout(tensor, pipeline), PlatformConfig(params_dtype=dtype)
        training = replace(PRETRAINING, use_distributed_optimizer=distributed_optimizer, eval_interval=STOPPED)
        with grouped(config, platform) as groups:
            setup = setup_of(groups, config, architecture, platform)
            result, entries = train(
                setup,
                segment_of(prefix, WHOLE),
                folder,
                config=training,
                saving=CheckpointConfig(save_interval=SAVED),
                # Losses of two iterations are not logged yet where the checkpoint is written.
                logging=replace(LOGGING, log_interval=4),
                evaluate=partial(held_out, groups),
            )
            target = load_target(result.checkpoint, setup)
            losses = held_out(groups, target)
        assert losses == result.evaluations[-1].losses  # as read back from disk, bit for bit
        outcomes.append((curve(entries), losses["held_out"]))
    return outcomes


def held_out(groups, target) -> dict[str, float]:
    return {"held_out": evaluate_loss(target, make_batches(), groups)}


def start_only(rank: int, world_size: int, prefix: str, cases: list[tuple]) -> None:
    """The same, but stopped after the first checkpoint."""
    for case in cases:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            patch.setattr("tests.target.test_resharding.held_out", stop)
            go_on(rank, world_size, prefix, [case])


def stop(*_: object) -> None:
    raise Stopped


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


def cases_of(folder: Path, cases: list[tuple]) -> list[tuple]:
    return [(str(folder / name), *rest) for name, *rest in cases]


def compare(found: list, expected: list, atol: float) -> None:
    for (curve, loss), (expected_curve, expected_loss) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(curve[:, 0], expected_curve[:, 0])
        np.testing.assert_allclose(curve[:, 1], expected_curve[:, 1], atol=atol, rtol=0)
        np.testing.assert_allclose(curve[:, 2], expected_curve[:, 2], rtol=10 * atol)
        assert loss == pytest.approx(expected_loss, abs=atol)


def test_a_run_goes_on_at_another_layout(prefix, tmp_path):
    models = [(NEOX, True, "fp32"), (LLAMA, False, "fp32"), (NEOX, True, "bf16"), (NEOX, False, "bf16")]
    names = ("neox", "llama", "bf16", "bf16_whole")
    one = [(name, 1, 1, *model) for name, model in zip(names, models, strict=True)]
    expected = go_on(0, 1, prefix, cases_of(tmp_path / "uninterrupted", one))
    four = [(name, 2, 2, *model) for name, model in zip(names, models, strict=True)]
    run_distributed(start_only, 4, prefix, cases_of(tmp_path / "saved", four))
    assert all((tmp_path / "saved" / name / "segment" / "step_00000006").is_dir() for name in names)

    shutil.copytree(tmp_path / "saved", tmp_path / "alone")
    switched = [(name, 1, 1, a, not divided, dtype) for name, _, _, a, divided, dtype in one]
    found = go_on(0, 1, prefix, cases_of(tmp_path / "alone", switched))
    compare(found[:2], expected[:2], atol=1e-4)
    compare(found[2:], expected[2:], atol=3e-2)

    replicas = [case for case in switched if case[0] in ("neox", "llama", "bf16")]
    shutil.copytree(tmp_path / "saved", tmp_path / "replicas")
    ranks = run_distributed(go_on, 4, prefix, cases_of(tmp_path / "replicas", replicas))
    compare(ranks[0][:2], expected[:2], atol=1e-4)
    compare(ranks[0][2:], expected[2:3], atol=3e-2)
    assert [loss for _, loss in ranks[3]] == [loss for _, loss in ranks[0]]


def small_models(rank: int, world_size: int, folder: str, last_step: int) -> list[np.ndarray]:
    """Bilevel steps on all ranks, saved every second one; proxy, score model, z and what was logged."""
    with grouped(layout()) as groups:
        trainer = make_trainer(CONFIG, torch.float64, groups)
        metrics = MetricsLogger(folder, is_writer=groups.is_main, tensorboard=False)
        labels = {"arm": "bliss", "round": 1, "stage": "bilevel"}
        run_steps(trainer, last_step, Bookkeeping(Path(folder), 2, 1, metrics, labels, False), groups)
        metrics.close()
    models = (trainer.proxy, trainer.score_model)
    weights = [torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy() for model in models]
    return [*weights, trainer.z.numpy()]


def test_proxy_and_score_model_go_on_with_another_number_of_ranks(tmp_path):
    folders = [str(tmp_path / name) for name in ("whole", "ranks", "alone")]
    expected = small_models(0, 1, folders[0], 5)
    run_distributed(small_models, 2, folders[1], 3)
    small_models(0, 1, folders[2], 3)
    assert checkpoint.load_state(tmp_path / "ranks" / "latest.pt")["steps_done"] == 2
    found = [small_models(0, 1, folders[1], 5), *run_distributed(small_models, 2, folders[2], 5)]
    for values in found:
        for value, expected_value in zip(values, expected, strict=True):
            np.testing.assert_allclose(value, expected_value, rtol=0, atol=1e-10 * np.abs(expected_value).max())
