"""Losses against plain cross-entropy, the three preferences by hand; ranks, kills, precision, and what a plan says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_bliss.arms import ARMS, losses
from megatron_bliss.arms.losses import NO_LOSS, preferred
from megatron_bliss.arms.perplexity import PerplexityConfig
from megatron_bliss.bilevel import head
from megatron_bliss.data.batches import UnitDataset
from megatron_bliss.data.corpus_writer import CorpusWriter
from megatron_bliss.models.presets import flops_per_token
from megatron_bliss.models.transformer import LanguageModel
from megatron_bliss.plan.plan import Machine, make_plan
from megatron_bliss.run.checks import parse_arguments
from megatron_bliss.selection import score_pass
from tests.arms.shards import LENGTH, VOCABULARY, make_inputs, scored, write
from tests.distributed import run_distributed
from tests.runs import command, run
from tests.targets import LLAMA, NEOX, grouped, layout

ARCHITECTURES = [replace(one, vocab_size=VOCABULARY, num_layers=1) for one in (NEOX, LLAMA)]
HIGH = PerplexityConfig(keep="high")


def proxy(architecture=ARCHITECTURES[0], dtype=torch.float32) -> tuple[LanguageModel, dict]:
    return LanguageModel(architecture, seed=5).to(dtype), {"model_digest": "d"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A shard of 50 units, some of one token."""
    write(tmp_path / "shard", 50, seed=1)
    write(tmp_path / "reference", 5, seed=2)
    return tmp_path


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=["neox", "llama"])
def test_losses_are_those_of_plain_cross_entropy(folder: Path, architecture, monkeypatch) -> None:
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", 16 * VOCABULARY)  # several chunks a micro-batch
    model, corpus = LanguageModel(architecture, seed=5), UnitDataset(str(folder / "shard"), LENGTH).corpus
    found = scored("perplexity", HIGH, folder, load_proxy=lambda: proxy(architecture))
    expected = []
    for unit in range(len(corpus)):
        tokens = torch.from_numpy(corpus[unit][:LENGTH].astype(np.int64))
        loss = F.cross_entropy(model(tokens[None])[0, :-1], tokens[1:]) if len(tokens) > 1 else None
        expected.append(None if loss is None else loss.item())
    lowest = min(loss for loss in expected if loss is not None)
    assert None in expected and found.values.dtype == np.float32
    np.testing.assert_allclose(found.values, [lowest if loss is None else loss for loss in expected], rtol=1e-5)
    assert found.flops == corpus.num_tokens * flops_per_token(architecture, LENGTH)
    assert found.settings == {"method": "perplexity", "keep": "high", "model_digest": "d"}


def test_each_preference_by_hand() -> None:
    losses = np.array([3.0, 1.0, NO_LOSS, 5.0, 4.0, 2.0, 2.0], dtype=np.float32)
    np.testing.assert_array_equal(preferred(losses, "low"), [-3, -1, -5, -5, -4, -2, -2])
    np.testing.assert_array_equal(preferred(losses, "high"), [3, 1, 1, 5, 4, 2, 2])
    # of six losses the ranks are 0, 1.5, 1.5, 3, 4, 5, and their middle is 2.5
    np.testing.assert_allclose(preferred(losses, "middle") * 6, [-0.5, -2.5, -2.5, -2.5, -1.5, -1, -1], rtol=1e-6)
    with pytest.raises(ValueError, match="found only units of one token in the shard"):
        preferred(losses[2:3], "low")


def test_a_loss_that_is_no_number_names_its_unit(folder: Path) -> None:
    model, _ = proxy()
    with torch.no_grad():
        model.output.weight[3] = torch.nan
    with pytest.raises(RuntimeError, match=r"not finite for units \[0, 1, .*lower proxy.warmup_optimizer.lr"):
        scored("perplexity", HIGH, folder, load_proxy=lambda: (model, {}))


def test_bf16_is_near(folder: Path) -> None:
    exact = scored("perplexity", HIGH, folder, load_proxy=proxy, folder=folder / "fp32").values
    low = scored("perplexity", HIGH, folder, load_proxy=lambda: proxy(dtype=torch.bfloat16)).values
    assert not np.array_equal(exact, low)
    np.testing.assert_allclose(low, exact, rtol=2e-2)


def of_rank(rank: int, world_size: int, folder: Path) -> np.ndarray | None:
    score_pass.BLOCK_UNITS = 8
    with grouped(layout()) as groups:
        return ARMS["perplexity"].scores(PerplexityConfig(), make_inputs(folder, groups, load_proxy=proxy)).values


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_change_nothing(folder: Path, ranks: int, monkeypatch) -> None:
    main, *others = run_distributed(of_rank, ranks, folder)
    shutil.rmtree(folder / "parts")
    monkeypatch.setattr(score_pass, "BLOCK_UNITS", 8)
    alone = scored("perplexity", PerplexityConfig(), folder, load_proxy=proxy).values
    assert np.array_equal(main, alone) and others == [None] * (ranks - 1)


def test_a_killed_pass_reads_only_what_is_missing(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(score_pass, "BLOCK_UNITS", 8)
    whole = scored("perplexity", HIGH, folder, load_proxy=proxy, folder=folder / "whole").values
    measure, read = losses.unit_losses, []

    def mortal(model, batch):
        if len(read) == 7:  # in the fourth block of seven
            raise KeyboardInterrupt
        read.append(len(batch))
        return measure(model, batch)

    monkeypatch.setattr(losses, "unit_losses", mortal)
    with pytest.raises(KeyboardInterrupt):
        scored("perplexity", HIGH, folder, load_proxy=proxy)
    monkeypatch.setattr(losses, "unit_losses", lambda model, batch: read.append(len(batch)) or measure(model, batch))
    read.clear()
    assert np.array_equal(scored("perplexity", HIGH, folder, load_proxy=proxy).values, whole)
    assert sum(read) == 50 - 3 * 8


def test_a_run_does_what_its_plan_says(corpus: Path, tmp_path: Path) -> None:
    options = ("--arms", "perplexity", "--rounds", "1", "--evaluation.tasks", "[]", "--scoring.params_dtype", "bf16",
               "--baselines.perplexity.keep", "low")  # fmt: skip
    result = run(corpus, tmp_path / "run", *options)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    flops = {record["stage"]: record["flops"] for record in summary["stages"] if record["arm"] == "perplexity"}
    plan = make_plan(parse_arguments(command(corpus, tmp_path / "run", *options)[2:]), Machine(world_size=1))
    planned = {one["stage"]: one["flops"] for one in plan["stages"] if one["arm"] == "perplexity"}
    assert planned == flops and flops["score"] > 0 and "bilevel" not in flops
    (entry,) = [one for one in plan["memory"]["stages"] if one["stage"] == "perplexity"]
    assert entry["parameters"] == 2 * plan["models"]["proxy"]["parameters"] and entry["working"] > 0
    settings = json.loads((tmp_path / "run" / "perplexity" / "round_01" / "score" / "scores.json").read_text())
    assert settings["keep"] == "low" and settings["params_dtype"] == "bf16" and len(settings["model_digest"]) == 64


def test_units_of_one_token_alone_are_refused(folder: Path) -> None:
    with CorpusWriter(str(folder / "short"), VOCABULARY) as writer:
        writer.add([1, 2, 3], [1, 1, 1])
    source = UnitDataset(str(folder / "short"), LENGTH)
    with pytest.raises(ValueError, match="leave out the arm perplexity"):
        scored("perplexity", HIGH, folder, load_proxy=proxy, source=source)
