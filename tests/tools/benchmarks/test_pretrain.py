"""tools/benchmark.py pretrain: the keys it promises, and that its cases train the same model on the same tokens."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tools import benchmark
from tools.benchmarks import pretrain
from tools.benchmarks.measure import Peak
from tools.benchmarks.pretrain_cases import CASES

pytest.importorskip("transformers", reason="needs the [eval] extra")
# megatron-core counts the padding of a vocabulary that is no multiple of 128 as tokens
SIZES = ["--num-layers", "1", "--hidden-size", "32", "--num-attention-heads", "2", "--vocab", "256"]
TINY = [*SIZES, "--seq", "16", "--micro-batch-size", "2", "--micro-batches", "2", "--repetitions", "1"]


def test_json_has_the_promised_figures(monkeypatch, capsys) -> None:
    monkeypatch.setattr(pretrain, "_peak_in_child", lambda name, _: Peak(1000 + len(name), 5000))
    assert benchmark.main(["pretrain", *TINY, "--json", "--peak-tflops", "0.1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["machine"]["torch"] == torch.__version__ and result["model"].startswith("pythia-70m num_layers=1")
    assert all(result[name] > 0 for name in pretrain.PROMISED)
    assert result["peak_vs_huggingface"] == pytest.approx(6004 / 6011)
    page = pretrain.markdown(result, "a command")
    assert all(label in page for label in pretrain.LABELS.values())


def test_utilisation_of_a_cpu_is_unknown_unless_its_peak_is_given(capsys) -> None:
    assert benchmark.main(["pretrain", *TINY, "--no-memory", "--cases", "ours", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model_flops_utilisation"] is None and result["tokens_per_second_vs_huggingface"] is None
    assert benchmark.main(["pretrain", "--seq", "0"]) == 1
    assert "found --seq 0, expected at least 1" in capsys.readouterr().err


def test_every_case_learns_the_same_tokens() -> None:
    """From the loss of a uniform guess, down, at much the same pace (each case draws its own weights)."""
    options = benchmark.parse_arguments(["pretrain", *TINY])
    settings, groups = pretrain._settings(options), pretrain._groups(options)
    curves = {}
    try:
        for name, make in CASES.items():
            step = make(settings, groups)
            curves[name] = [step() for _ in range(40)]
    finally:
        pretrain.parallel.destroy()
    for name, losses in curves.items():
        assert losses[0] == pytest.approx(math.log(256), abs=0.05), name
        assert losses[0] - losses[-1] == pytest.approx(curves["ours"][0] - curves["ours"][-1], rel=0.25), name
        assert losses[-1] < losses[0] - 0.05, name


def test_default_case_is_the_reference_case() -> None:
    options = benchmark.parse_arguments(["pretrain"])
    found = options.preset, options.seq, options.micro_batch_size, options.micro_batches, options.dtype, options.cases
    assert found == ("pythia-70m", 512, 4, 1, "fp32", list(CASES))
