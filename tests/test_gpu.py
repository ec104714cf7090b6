"""The same numbers on a GPU as on the CPU. Skipped where there is no CUDA device."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bliss.base.parallel import World
from megatron_bliss.bilevel.curvature import curvature_product
from megatron_bliss.bilevel.objective import Loss, Objective
from megatron_bliss.bilevel.teacher import TargetTeacher
from megatron_bliss.config.models import ScoreConfig
from megatron_bliss.models.families import FAMILIES
from megatron_bliss.models.presets import resolve_architecture
from megatron_bliss.models.score import build_score_model
from megatron_bliss.models.transformer import build_lm
from megatron_bliss.scorers.models import ModelScorer, Reading
from megatron_bliss.scorers.scorer import Scorer
from tests.bilevel.trainers import ALONE, CONFIG, SIZES, VOCABULARY, RandomUnits, make_trainer
from tests.runs import run
from tests.targets import SEQ_LENGTH, VOCAB_SIZE, grouped, layout, make_target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, found none"),
]


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_a_curvature_product_equals_the_cpus(kind: str) -> None:
    batch = RandomUnits(4, 1).batch(np.arange(4))
    results = []
    for device in ("cpu", "cuda"):
        model = build_lm(SIZES, vocab_size=VOCABULARY, seed=1, dtype=torch.float64, device=device)
        z = torch.nn.utils.parameters_to_vector(model.parameters()).detach() * 0.5
        weights = torch.full((4,), 0.25, dtype=torch.float64, device=device)
        loss = Loss(Objective(), batch.to(torch.device(device)), weights)
        result = curvature_product(model, loss, z, curvature=kind)
        results.append(torch.cat([result.product.flat, result.gradient.flat, result.influence]).cpu())
    assert torch.allclose(results[0], results[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_bilevel_steps_equal_the_cpus(family: str) -> None:
    found, score = [], ScoreConfig(family=family)
    for world in (ALONE, World(None, 0, 1, torch.device("cuda"))):
        trainer = make_trainer(CONFIG, torch.float64, world, score=score)
        found.append([trainer.step() for _ in range(3)])
    for expected, step in zip(*found, strict=True):
        assert step == pytest.approx(expected, rel=1e-8)


def test_scores_of_a_model_equal_the_cpus_and_have_the_same_bits_twice() -> None:
    lengths = np.random.default_rng(1).integers(0, 40, 64)
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, lengths.sum()).astype(np.uint16)
    model = build_score_model(ScoreConfig(head_init_std=1.0), resolve_architecture(SIZES, VOCABULARY), seed=1)
    expected = Scorer(ModelScorer(model), 16, "mean").score(tokens, lengths)
    reading = Reading(torch.device("cuda"), batch_tokens=256)
    found = [Scorer(ModelScorer(copy.deepcopy(model), reading), 16, "mean").score(tokens, lengths) for _ in range(2)]
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    assert np.array_equal(*found)


def test_an_offloaded_target_teaches_the_same_and_leaves_the_device() -> None:
    with grouped(layout()) as groups:
        target = make_target(layout(), groups)
        tokens = torch.randint(VOCAB_SIZE, (4, SEQ_LENGTH), generator=torch.Generator().manual_seed(1))
        expected = TargetTeacher(target, groups, VOCAB_SIZE)(tokens)
        teacher = TargetTeacher(target, groups, VOCAB_SIZE, offload=True)
        assert {p.device.type for p in target[0].parameters()} == {"cpu"}
        found = teacher(tokens)
        assert torch.equal(found.hidden_states, expected.hidden_states)
        assert {p.device.type for p in target[0].parameters()} == {"cpu"}


def test_a_whole_run_ends_with_finite_losses(corpus: Path, tmp_path: Path) -> None:
    """Without tasks: lm-eval need not be there."""
    options = ["--platform.device", "cuda", "--platform.params_dtype", "bf16", "--evaluation.tasks", "[]"]
    result = run(corpus, tmp_path / "run", *options)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for arm in summary["arms"].values():
        assert all(np.isfinite(point[1]) for point in arm["validation_loss"])


def test_two_runs_end_with_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        result = run(corpus, tmp_path / name, "--platform.device", "cuda", "--evaluation.tasks", "[]")
        assert result.returncode == 0, result.stderr
        arms = json.loads((tmp_path / name / "summary.json").read_text())["arms"]
        found.append({arm: record["validation_loss"] for arm, record in arms.items()})
    assert found[0] == found[1]
