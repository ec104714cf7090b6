"""The arm mates_kl: influences on the proxy against torch's optimizers in fp64, on ranks; whole runs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_bliss.arms import ARMS
from megatron_bliss.arms.mates_kl import MatesKlConfig
from megatron_bliss.arms.probing import measure_influences
from megatron_bliss.arms.proxy_probing import ProxyProbe, proxy_oracle, proxy_step
from megatron_bliss.base import checkpoint
from megatron_bliss.base.parallel import Groups
from megatron_bliss.models.transformer import LanguageModel
from megatron_bliss.plan.plan import Machine, make_plan
from megatron_bliss.run.checks import parse_arguments
from tests.bilevel.problems import language_model, random_batch
from tests.distributed import run_distributed
from tests.runs import command, kill_when, metric_lines, run
from tests.targets import grouped, layout

LR, CLIP_GRAD, EPS = 1e-2, 1.0, 1e-8
RUN = ("--arms", "mates_kl,random", "--evaluation.tasks", "[]", "--baselines.mates_kl.probe_units", "24",
       "--baselines.mates_kl.reference_samples", "4", "--baselines.mates_kl.regressor_iters", "5")  # fmt: skip


def adam_state(model: LanguageModel) -> dict:
    """Moments as of 6 steps."""
    generator = torch.Generator().manual_seed(3)

    def moment(weight: torch.Tensor, square: bool) -> torch.Tensor:
        drawn = 0.1 * torch.randn(weight.shape, generator=generator)
        return drawn.square() if square else drawn

    moments = {name: (moment(p, False), moment(p, True)) for name, p in model.named_parameters()}
    return {"step": 6, "moments": moments, "lr": LR, "betas": (0.9, 0.95), "eps": EPS}


def proxy() -> LanguageModel:
    return language_model(dtype=torch.float32)


REFERENCE = [random_batch(3, 9, seed=1), random_batch(2, 7, seed=2)]
UNITS = [random_batch(1, 8, seed=seed, labelled=1.0) for seed in range(10, 14)]


def probe(kind: str, clip_grad: float = CLIP_GRAD) -> ProxyProbe:
    model = proxy()
    step = proxy_step(model, adam_state(model), kind, 0.0, clip_grad)
    return ProxyProbe(model, step, REFERENCE, torch.device("cpu"))


def token_losses(model: LanguageModel, batch) -> torch.Tensor:
    logits = model.hidden_states(batch.tokens) @ model.output_weight.T
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch.tokens[:, 1:], reduction="none")
    return losses[batch.label_mask[:, 1:]]


def expected_influence(kind: str, clip_grad: float, unit) -> float:
    """A copy in fp64, torch's optimizer, one step."""
    model = proxy()
    adam = adam_state(model)
    model = model.double().requires_grad_(True)

    def loss() -> float:
        with torch.no_grad():
            return torch.cat([token_losses(model, batch) for batch in REFERENCE]).mean().item()

    before = loss()
    token_losses(model, unit).mean().backward()
    if clip_grad:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    if kind == "adam":
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=EPS, weight_decay=0.0)
        for name, weight in model.named_parameters():
            first, second = (part.double() for part in adam["moments"][name])
            optimizer.state[weight] = {"step": torch.tensor(6.0), "exp_avg": first, "exp_avg_sq": second}
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer.step()
    return before - loss()


@pytest.mark.parametrize("clip_grad", [CLIP_GRAD, 0.0])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_influence_is_what_torchs_optimizer_does_to_the_loss(kind: str, clip_grad: float) -> None:
    measured = probe(kind, clip_grad)
    before = copy.deepcopy(measured.model.state_dict())
    found = [measured.influence(unit) for unit in UNITS]
    expected = [expected_influence(kind, clip_grad, unit) for unit in UNITS]
    assert np.std(expected) > 1e-4
    np.testing.assert_allclose(found, expected, rtol=5e-4, atol=2e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in measured.model.state_dict().items())


def test_an_influence_that_is_no_number_is_refused_and_the_weights_come_back() -> None:
    measured = probe("adam")
    before = copy.deepcopy(measured.model.state_dict())
    measured.step = replace(measured.step, lr=float("inf"))
    with pytest.raises(FloatingPointError):
        measured.influence(UNITS[0])
    assert all(torch.equal(before[name], tensor) for name, tensor in measured.model.state_dict().items())


class Shard:
    """UNITS again and again, as a source."""

    def batch(self, ids: np.ndarray):
        return UNITS[int(ids[0]) % len(UNITS)]


def measured_by(groups: Groups, folder: Path) -> np.ndarray:
    model = proxy()
    inputs = SimpleNamespace(groups=groups, folder=folder, source=Shard(), description="round 1", show_progress=False)
    oracle = proxy_oracle(
        inputs, model, lambda model: proxy_step(model, adam_state(model), "adam", 0.0, 1.0), REFERENCE
    )
    return measure_influences(inputs, np.arange(70), oracle, "mates_kl")


def on_ranks(rank: int, world_size: int, folder: Path) -> np.ndarray:
    with grouped(layout()) as groups:
        return measured_by(groups, folder)


def test_ranks_share_the_probes(tmp_path: Path) -> None:
    with grouped(layout()) as groups:
        expected = measured_by(groups, tmp_path / "alone")
    for world_size in (2, 4):
        for found in run_distributed(on_ranks, world_size, tmp_path / str(world_size)):
            np.testing.assert_allclose(found, expected, rtol=1e-6)  # sums depend on where memory lies


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mates_kl") / "run"
    result = run(corpus, folder, *RUN)
    assert result.returncode == 0, result.stderr
    return folder


def test_a_run_does_what_its_plan_says(corpus: Path, finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    stages = {(one["arm"], one["round"], one["stage"]): one for one in summary["stages"]}
    plan = make_plan(parse_arguments(command(corpus, finished, *RUN)[2:]), Machine(world_size=1))
    planned = {(one["arm"], one["round"], one["stage"]): one["flops"] for one in plan["stages"]}
    for key, flops in planned.items():
        assert (0.5 if key[::2] == ("mates_kl", "score") else 1) * flops <= stages[key]["flops"] <= flops, key
    memory = {one["stage"]: one for one in plan["memory"]["stages"]}
    assert memory["mates_kl probes"]["gradients"] == memory["mates_kl probes"]["parameters"] > 0
    both = make_plan(
        parse_arguments(command(corpus, finished, *RUN, "--arms", "bliss,mates_kl")[2:]), Machine(world_size=1)
    )
    bliss = next(one for one in both["memory"]["stages"] if one["stage"] == "bilevel")
    assert memory["mates_kl bilevel"]["optimizer"] < bliss["optimizer"]  # no score model, no z
    for number in (1, 2):
        folder = finished / "mates_kl" / f"round_{number:02d}"
        settings = json.loads((folder / "score" / "scores.json").read_text())
        assert settings["method"] == "mates_kl" and settings["probes"] == 24 and settings["influence_std"] > 0
        state = checkpoint.load_state(folder / "bilevel" / "final.pt")
        assert "score_model" not in state and state["adam"]["step"] == 8
    logged = [line for line in metric_lines(finished) if (line["arm"], line["stage"]) == ("mates_kl", "bilevel")]
    assert len(logged) == 16 and all(line["kl"] > 0 and line["validation_loss"] > 0 for line in logged)
    assert "mates_kl" in (finished / "report.html").read_text()


def test_the_tie_changes_the_scores(corpus: Path, finished: Path, tmp_path: Path) -> None:
    result = run(corpus, tmp_path / "run", *RUN, "--rounds", "1", "--bilevel.kl_weight", "0")
    assert result.returncode == 0, result.stderr
    scores = [np.load(folder / "mates_kl/round_01/score/scores.npy") for folder in (finished, tmp_path / "run")]
    assert not np.array_equal(*scores)


def test_a_killed_run_ends_with_the_same_bits(corpus: Path, finished: Path, tmp_path: Path) -> None:
    kill_when(corpus, tmp_path / "run", "mates_kl/round_01/bilevel/latest.pt", *RUN)
    kill_when(corpus, tmp_path / "run", "mates_kl/round_02/score/parts/probes/000000.npy", *RUN)
    result = run(corpus, tmp_path / "run", *RUN)
    assert result.returncode == 0, result.stderr
    for number in (1, 2):
        place = f"mates_kl/round_{number:02d}/score/scores.npy"
        assert (tmp_path / "run" / place).read_bytes() == (finished / place).read_bytes()


def test_its_options_are_those_of_mates_with_bounds_of_their_own(corpus: Path, tmp_path: Path) -> None:
    assert ARMS["mates_kl"].settings is MatesKlConfig
    for option, value in (("probe_units", "3"), ("lr", "-1"), ("micro_batch_size", "0")):
        result = run(corpus, tmp_path / "run", *RUN, f"--baselines.mates_kl.{option}", value)
        assert result.returncode == 2 and f"found baselines.mates_kl.{option} {value}" in result.stderr
