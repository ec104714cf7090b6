"""Influences against torch's own AdamW and SGD in fp64; every layout; kills; a planted signal."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_bliss.arms import ARMS, influence_model, reading
from megatron_bliss.arms.inputs import Inputs, Scores
from megatron_bliss.arms.mates import MatesConfig
from megatron_bliss.arms.probing import Probe, Step
from megatron_bliss.base.metrics import MetricsLogger
from megatron_bliss.config.models import ScoreConfig, TargetConfig
from megatron_bliss.config.platform import PlatformConfig
from megatron_bliss.config.training import OptimizerConfig
from megatron_bliss.data.batches import UnitDataset
from megatron_bliss.data.corpus_writer import CorpusWriter
from megatron_bliss.models.convert import converted, proxy_layout, target_layout
from megatron_bliss.models.loop import Bookkeeping, run_steps
from megatron_bliss.models.score import build_score_model
from megatron_bliss.models.transformer import LanguageModel
from megatron_bliss.plan.plan import Machine, make_plan
from megatron_bliss.run.checks import parse_arguments
from megatron_bliss.target.checkpoint import load_moments, load_target_and_optimizer
from megatron_bliss.target.gradient import parameters
from megatron_bliss.target.model import global_name
from megatron_bliss.target.setup import load_target
from megatron_bliss.target.state import MOMENTS
from megatron_bliss.target.trainer import TargetTrainer
from megatron_bliss.target.weights import full_weights
from tests.distributed import run_distributed
from tests.report.run_folders import check_page
from tests.runs import command, metric_lines, run
from tests.targets import (
    LLAMA,
    NEOX,
    PRETRAINING,
    SEQ_LENGTH,
    VOCAB_SIZE,
    grouped,
    layout,
    make_corpus,
    segment_of,
    setup_of,
    train,
)

ARCHITECTURES = {"neox": NEOX, "llama": LLAMA, "deep": replace(LLAMA, num_layers=4)}
INTERLEAVED = replace(layout(1, 2), virtual_pipeline_model_parallel_size=2)
PROBED = 5
STEPS = {"adam": (1e-2, 1.0), "sgd": (0.3, 1.0), "sgd without clipping": (0.05, 0.0)}
OPTIONS = MatesConfig(
    probe_units=48, reference_samples=6, micro_batch_size=4, lr=1e-2, regressor_iters=6, regressor_batch_size=8
)


RUN = ("--arms", "bliss,random,dsir,mates", "--baselines.mates.probe_units", "24",
       "--baselines.mates.reference_samples", "4", "--baselines.mates.regressor_iters", "5",
       "--evaluation.tasks", "[]")  # fmt: skip


def write(path: Path, seed: int, count: int = 60, structured: int = 1) -> str:
    """Units of 3 to 16 tokens: every ``structured``-th counts up by one below 40, the others are noise above that."""
    generator = np.random.default_rng(seed)
    with CorpusWriter(str(path), VOCAB_SIZE) as writer:
        for number in range(count):
            length = int(generator.integers(3, SEQ_LENGTH + 1))
            counted = (generator.integers(40) + np.arange(length)) % 40
            noise = generator.integers(40, VOCAB_SIZE, length)
            writer.add(counted if number % structured == 0 else noise, [length])
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A shard, a reference set, and a briefly trained target of each architecture."""
    path = tmp_path_factory.mktemp("mates")
    write(path / "shard", 1, structured=2)
    write(path / "reference", 2, count=10)
    prefix = make_corpus(path / "training")
    for name, architecture in ARCHITECTURES.items():
        with grouped(layout()) as groups:
            train(setup_of(groups, architecture=architecture), segment_of(prefix, 8), path / name)
    return path


def checkpoint(folder: Path, name: str) -> Path:
    return next((folder / name / "segment").glob("step_*8"))


def open_target(folder: Path, name: str, config: TargetConfig, groups):
    return load_target(checkpoint(folder, name), setup_of(groups, config, ARCHITECTURES[name]))


def open_probe(folder: Path, name: str, kind: str, config: TargetConfig, groups) -> Probe:
    target = open_target(folder, name, config, groups)
    moments = load_moments(checkpoint(folder, name), target, groups) if kind == "adam" else None
    reference = UnitDataset(str(folder / "reference"), SEQ_LENGTH)
    batches = [reference.batch(np.arange(*bounds)) for bounds in ((0, 4), (4, 6))]
    return Probe(target, Step(*STEPS[kind], moments), batches, groups)


def influences(folder: Path, name: str, kind: str, config: TargetConfig, groups) -> list[float]:
    probe, shard = open_probe(folder, name, kind, config, groups), UnitDataset(str(folder / "shard"), SEQ_LENGTH)
    return [probe.influence(shard.batch(np.array([unit]))) for unit in range(PROBED)]


def plain_model(tensors, architecture) -> LanguageModel:
    """The target's tensors by global name in plain PyTorch, fp64."""
    model = LanguageModel(architecture, dtype=torch.float64)
    found = converted(tensors.__getitem__, target_layout(architecture), proxy_layout(architecture))
    model.load_state_dict({name: tensor.double() for name, tensor in found})
    return model


def plain_loss(model: LanguageModel, dataset: UnitDataset, units) -> torch.Tensor:
    """Mean over all labelled tokens, unit by unit without padding."""
    losses = []
    for unit in units:
        tokens = torch.from_numpy(np.array(dataset.corpus[int(unit)][:SEQ_LENGTH], dtype=np.int64))
        losses.append(F.cross_entropy(model(tokens[None])[0, :-1], tokens[1:], reduction="none"))
    return torch.cat(losses).mean()


def expected_influence(model, moments, step: int, kind: str, shard, reference, unit: int) -> float:
    """A copy, torch's optimizer, one step. ``moments``: two models whose weights are Adam's moments."""
    model = copy.deepcopy(model)
    before = plain_loss(model, reference, range(6)).item()
    plain_loss(model, shard, [unit]).backward()
    lr, clip_grad = STEPS[kind]
    if clip_grad:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    if kind == "adam":
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        for parameter, *pair in zip(model.parameters(), *(m.parameters() for m in moments), strict=True):
            state = dict(zip(MOMENTS, (p.detach().clone() for p in pair), strict=True))
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **state}
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    optimizer.step()
    return before - plain_loss(model, reference, range(6)).item()


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("name", ["neox", "llama"])
def test_influence_is_what_torchs_optimizer_does_to_the_loss(folder: Path, name: str, kind: str) -> None:
    architecture, shard = ARCHITECTURES[name], UnitDataset(str(folder / "shard"), SEQ_LENGTH)
    reference = UnitDataset(str(folder / "reference"), SEQ_LENGTH)
    with grouped(layout()) as groups:
        target = open_target(folder, name, layout(), groups)
        names = list(target_layout(architecture))
        model = plain_model(dict(full_weights(target, names, groups)), architecture)
        moments = load_moments(checkpoint(folder, name), target, groups)
        own = [global_name(target[0], name) for name, _ in target[0].named_parameters()]
        pairs = [{n: pair[i][:VOCAB_SIZE] if n.endswith(("embeddings.weight", "output_layer.weight")) else pair[i]
                  for n, pair in zip(own, moments.pairs, strict=True)} for i in (0, 1)]  # fmt: skip
        plain_moments = [plain_model(tensors, architecture) for tensors in pairs]
        found = influences(folder, name, kind, layout(), groups)
    expected = [
        expected_influence(model, plain_moments, moments.step, kind, shard, reference, unit) for unit in range(PROBED)
    ]
    assert moments.step == 8 and np.std(expected) > 1e-3
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=3e-6)


def test_moments_are_those_that_training_would_go_on_with(folder: Path) -> None:
    with grouped(layout()) as groups:
        target = open_target(folder, "llama", layout(), groups)
        moments = load_moments(checkpoint(folder, "llama"), target, groups)
        target[0].requires_grad_(True)
        trainer = TargetTrainer(target, PRETRAINING, groups, seq_length=SEQ_LENGTH, total_iterations=9)
        load_target_and_optimizer(checkpoint(folder, "llama"), target, trainer.optimizer, groups)
        (inner,) = trainer.optimizer.chained_optimizers
        for parameter, pair in zip(parameters(target), moments.pairs, strict=True):
            for name, tensor in zip(MOMENTS, pair, strict=True):
                assert torch.equal(inner.optimizer.state[parameter][name], tensor) and tensor.any()


LAYOUTS = {
    "tensor": layout(2),
    "sequence": layout(2, sequence_parallel=True),
    "pipeline": layout(1, 2),
    "interleaved": INTERLEAVED,
}
CASES = [(place, name, kind) for place in LAYOUTS for name in ("neox", "llama") for kind in ("adam", "sgd")]
CASES = [(place, "deep" if place == "interleaved" else name, kind) for place, name, kind in CASES]
CASES = sorted(set(CASES) - {("interleaved", "neox", "adam")})


def in_layouts(rank: int, world_size: int, folder: Path) -> list[list[float]]:
    found = []
    for place, name, kind in CASES:
        with grouped(LAYOUTS[place]) as groups:
            found.append(influences(folder, name, kind, LAYOUTS[place], groups))
    return found


def test_influences_are_the_same_in_every_layout(folder: Path) -> None:
    first, second = run_distributed(in_layouts, 2, folder)
    assert first == second
    for found, (place, name, kind) in zip(first, CASES, strict=True):
        with grouped(layout()) as groups:
            expected = influences(folder, name, kind, layout(), groups)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=f"{place}, {name}, {kind}")


def test_a_target_in_bf16_is_probed_in_fp32(folder: Path) -> None:
    platform = PlatformConfig(params_dtype="bf16")
    with grouped(layout(), platform) as groups:
        low_precision = setup_of(groups, platform=platform)
        train(low_precision, segment_of(str(folder / "training"), 8), folder / "bf16")
        path = checkpoint(folder, "bf16")
        rounded, target = load_target(path, low_precision), load_target(path, setup_of(groups))
        moments = load_moments(path, target, groups)
        for low, full, pair in zip(parameters(rounded), parameters(target), moments.pairs, strict=True):
            assert low.dtype == torch.bfloat16 and torch.equal(low.float(), full)
            assert full.dtype == pair[0].dtype == torch.float32 and pair[1].any()


def test_weights_are_left_as_they_were(folder: Path) -> None:
    with grouped(layout()) as groups:
        probe = open_probe(folder, "neox", "adam", layout(), groups)
        before = [parameter.detach().clone() for parameter in parameters(probe.target)]
        shard = UnitDataset(str(folder / "shard"), SEQ_LENGTH)
        first, again = (probe.influence(shard.batch(np.array([unit]))) for unit in (3, 3))
        assert first == again != 0
        probe.step = replace(probe.step, lr=float("inf"))
        with pytest.raises(FloatingPointError, match=r"of unit \[4\], expected a finite number: lower baselines.mates"):
            probe.influence(shard.batch(np.array([4])))
        assert all(map(torch.equal, before, parameters(probe.target)))


def make_inputs(folder: Path, parts: Path, groups, **changes) -> Inputs:
    def fit(trainer, steps: int) -> None:
        metrics = MetricsLogger(parts / "log", is_writer=groups.is_main, tensorboard=False)
        labels = {"arm": "mates", "round": 1, "stage": "score"}
        run_steps(trainer, steps, Bookkeeping(parts, 2, 1, metrics, labels, False), groups)
        metrics.close()

    defaults = {
        "source": UnitDataset(str(folder / "shard"), SEQ_LENGTH),
        "reference": UnitDataset(str(folder / "reference"), SEQ_LENGTH),
        "train_prefix": "",
        "eod": 0,
        "seed": 3,
        "folder": parts,
        "groups": groups,
        "micro_batch_size": 5,
        "show_progress": False,
        "description": "round 1",
        "load_target": lambda: open_target(folder, "neox", layout(), groups),
        "load_moments": lambda target: load_moments(checkpoint(folder, "neox"), target, groups),
        "target_architecture": NEOX,
        "target_optimizer": OptimizerConfig(),
        "load_proxy": None,
        "load_score_model": None,
        "load_tied_proxy": None,
        "new_score_model": functools.partial(
            build_score_model, ScoreConfig(activation="identity"), replace(NEOX, num_layers=1), seed=7
        ),
        "train": fit,
    }
    return Inputs(**defaults | changes)


def scored(folder: Path, parts: Path, options: MatesConfig = OPTIONS, **changes) -> Scores:
    with grouped(layout()) as groups:
        return ARMS["mates"].scores(options, make_inputs(folder, parts, groups, **changes))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Scores:
    return scored(folder, folder / "alone")


def of_rank(rank: int, world_size: int, folder: Path) -> tuple:
    found = scored(folder, folder / "ranks")
    return found.values, found.settings


def test_replicas_share_the_probes(folder: Path, alone: Scores) -> None:
    (values, settings), (other, _) = run_distributed(of_rank, 2, folder)
    assert other is None and sorted(path.name for path in (folder / "ranks" / "probes").iterdir()) == [
        f"{number:06d}.npy" for number in range(3)
    ]
    for path in (folder / "ranks" / "probes").iterdir():
        # sums depend in their last bit on where memory lies, which differs between processes
        np.testing.assert_allclose(np.load(path), np.load(folder / "alone" / "probes" / path.name), rtol=1e-5)
    np.testing.assert_allclose(values, alone.values, rtol=1e-4, atol=1e-6)
    assert settings["held_out_spearman"] == alone.settings["held_out_spearman"]


class Killed(Exception):
    pass


def test_a_killed_stage_goes_on_and_ends_with_the_same_scores(folder: Path, alone: Scores, tmp_path, monkeypatch):
    calls = 0

    def mortal(count: int, function, *arguments):
        nonlocal calls
        calls += 1
        if calls == count:
            raise Killed
        return function(*arguments)

    for owner, name, last in (
        (Probe, "influence", 20),  # in the second file of probes
        (influence_model.InfluenceRegression, "step", 4),  # after a state was saved
        (reading, "score_blocks", 1),  # when the data influence model is trained
    ):
        function, calls = getattr(owner, name), 0
        wrapped = functools.partial(mortal, last, function)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, (lambda call: lambda *args, **kwargs: call(*args))(wrapped))
            with pytest.raises((Killed, RuntimeError)):
                scored(folder, tmp_path / "parts")
    monkeypatch.setattr(Probe, "influence", None)  # nothing is measured or trained twice
    monkeypatch.setattr(influence_model.InfluenceRegression, "step", None)
    found = scored(folder, tmp_path / "parts")
    np.testing.assert_array_equal(found.values, alone.values)
    assert replace(found, values=None) == replace(alone, values=None)


def test_units_like_the_reference_score_higher(folder: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, probe_units=60, regressor_iters=60, regressor_lr=3e-3)
    found = scored(folder, tmp_path / "parts", options)
    counted, noise = found.values[::2], found.values[1::2]
    assert np.mean(counted[:, None] > noise[None, :]) > 0.95
    assert found.settings["held_out_spearman"] > 0.5 and not found.warnings


def test_noise_is_warned_of(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(influence_model, "spearman", lambda predicted, measured: 0.05)
    found = scored(folder, tmp_path / "parts")
    expected = "round 1: predicted influences have a rank correlation of 0.050 with measured ones on held-out probes"
    assert len(found.warnings) == 1 and found.warnings[0].startswith(expected)
    assert f"warning: {found.warnings[0]}" in capsys.readouterr().err


def test_too_small_a_shard_is_refused(folder: Path, tmp_path: Path) -> None:
    small = UnitDataset(write(tmp_path / "small", 1, count=12), SEQ_LENGTH)
    with pytest.raises(ValueError, match="found 12 units to probe in the shard, expected 20 or more"):
        scored(folder, tmp_path / "parts", source=small)


def test_rank_correlation_is_that_of_the_ranks_with_ties_shared() -> None:
    generator = np.random.default_rng(0)
    left, right = generator.permutation(50), generator.permutation(50)
    assert influence_model.spearman(left, right) == pytest.approx(np.corrcoef(left, right)[0, 1])
    assert influence_model.spearman(np.exp(left / 5), left) == pytest.approx(1)
    ties = np.array([1.0, 2.0, 2.0, 3.0])
    assert influence_model.spearman(ties, -ties) == pytest.approx(-1)
    assert influence_model.spearman(ties, np.ones(4)) == 0


def test_a_run_with_four_arms_does_what_its_plan_says(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run(corpus, folder, *RUN)
    assert result.returncode == 0, result.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["arms"]) == {"bliss", "random", "dsir", "mates"}
    assert len({tuple(map(tuple, arm["validation_loss"][:2])) for arm in summary["arms"].values()}) == 1  # warm-up
    assert len({tuple(arm["validation_loss"][-1]) for arm in summary["arms"].values()}) == 4
    stages = {(record["arm"], record["round"], record["stage"]): record for record in summary["stages"]}
    plan = make_plan(parse_arguments(command(corpus, folder, *RUN)[2:]), Machine(world_size=1))
    planned = {(one["arm"], one["round"], one["stage"]): one["flops"] for one in plan["stages"]}
    for key, flops in planned.items():
        assert (0.5 if key[::2] == ("mates", "score") else 1) * flops <= stages[key]["flops"] <= flops, key
    warmed_up = {arm for (arm, _, _), one in stages.items() if "warmup/proxy" in (one["needs"] or ())}
    assert warmed_up == {"bliss", "mates"}  # the others' cost holds no warm-up of the proxy
    assert summary["arms"]["dsir"]["cost"]["selection_flops"][-1][1] == 0
    for number in (1, 2):
        place = folder / "mates" / f"round_{number:02d}" / "score"
        settings = json.loads((place / "scores.json").read_text())
        assert settings["probes"] == 24 and settings["influence_std"] > 0 and -1 <= settings["held_out_spearman"] <= 1
        assert stages["mates", number, "score"]["flops"] > stages["bliss", number, "score"]["flops"]
        assert sorted(path.name for path in place.iterdir()) == ["done.json", "scorer", "scores.json", "scores.npy"]
    steps = [(line["round"], line["step"]) for line in metric_lines(folder) if line["stage"] == "score"]
    assert steps == [(number, step) for number in (1, 2) for step in range(1, 6)]
    page = (folder / "report.html").read_text()
    check_page(page)
    assert all(f"Scores, {arm}" in page for arm in ("bliss", "dsir", "mates"))
    assert page.count("Rank correlation with what was measured, on held-out units: ") == 1
