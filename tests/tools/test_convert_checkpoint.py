"""tools/convert_checkpoint.py: there and back gives the same bits, transformers loads what is written, nothing is half
written; and a run that begins from pretrained weights does."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_bliss.base import checkpoint
from megatron_bliss.config.models import ProxyConfig, ScoreConfig, TargetConfig
from megatron_bliss.models.presets import parameter_count
from megatron_bliss.models.score import build_score_model
from megatron_bliss.models.transformer import build_lm
from megatron_bliss.target.checkpoint import save_target
from megatron_bliss.target.model import output_weight
from megatron_bliss.target.pretrained import configured_architecture, load_pretrained, load_pretrained_proxy
from tests.huggingface import huggingface_logits, save_huggingface, some_tokens
from tests.targets import (
    LLAMA,
    NEOX,
    VOCAB_SIZE,
    grouped,
    last_hidden_states,
    layout,
    make_corpus,
    make_target,
    segment_of,
    setup_of,
    train,
)
from tools import convert_checkpoint

transformers = pytest.importorskip("transformers", reason="needs the [eval] extra")
ARCHITECTURES = pytest.mark.parametrize("arch", [NEOX, LLAMA], ids=["neox", "llama"])


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCAB_SIZE - 1)} | {"<|endoftext|>": VOCAB_SIZE - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def convert(source: tuple, to: tuple, *more: object) -> int:
    arguments = ["--from", *map(str, source), "--to", *map(str, to), *map(str, more)]
    return convert_checkpoint.main(arguments)


@ARCHITECTURES
def test_from_hugging_face_to_a_target_and_back(arch, tmp_path, tokenizer, capsys):
    save_huggingface(arch, tmp_path / "in")
    assert convert(("huggingface", tmp_path / "in"), ("target", tmp_path / "target")) == 0
    there = capsys.readouterr().out
    assert convert(("target", tmp_path / "target"), ("huggingface", tmp_path / "out"), "--tokenizer", tokenizer) == 0
    back = capsys.readouterr().out
    assert f"{parameter_count(arch):,} parameters, float32" in there
    assert there.splitlines()[1] == back.splitlines()[1]  # the digest
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(huggingface_logits(tmp_path / "out"), huggingface_logits(tmp_path / "in"))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("w3 w5").input_ids == [3, 5] and loaded.eos_token_id == VOCAB_SIZE - 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "target", "tokenizer.json"]


def test_half_precision_is_kept_or_changed_when_asked(tmp_path):
    save_huggingface(NEOX, tmp_path / "in")
    assert convert(("huggingface", tmp_path / "in"), ("target", tmp_path / "bf16"), "--dtype", "bf16") == 0
    assert convert(("target", tmp_path / "bf16"), ("huggingface", tmp_path / "out")) == 0
    assert convert(("target", tmp_path / "bf16"), ("huggingface", tmp_path / "wide"), "--dtype", "fp32") == 0
    first, half, wide = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out", "wide"))
    for name in first:
        assert torch.equal(first[name].bfloat16(), half[name]) and torch.equal(half[name].float(), wide[name]), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@ARCHITECTURES
@torch.no_grad()
def test_proxy_and_score_model_become_hugging_faces(arch, tmp_path):
    proxy = build_lm(arch, seed=1)
    config = ScoreConfig(activation="identity", head_init_std=1.0)
    score_model = build_score_model(config, arch, seed=2, trunk_from=proxy)
    state = {"proxy": proxy.state_dict(), "score_model": score_model.state_dict()}
    checkpoint.save_state(tmp_path / "final.pt", state | {"architecture": asdict(arch), "activation": "identity"})
    assert convert(("proxy", tmp_path / "final.pt"), ("huggingface", tmp_path / "proxy")) == 0
    torch.testing.assert_close(huggingface_logits(tmp_path / "proxy"), proxy(some_tokens()), atol=1e-4, rtol=0)

    assert convert(("score", tmp_path), ("huggingface", tmp_path / "score")) == 0
    trunk, head = (
        transformers.AutoModel.from_pretrained(tmp_path / "score"),
        tmp_path / "score" / "score_head.safetensors",
    )
    hidden, head = trunk(some_tokens()).last_hidden_state, load_file(head)
    scores = hidden.mean(1) @ head["weight"][0] + head["bias"]
    expected = score_model(some_tokens(), torch.full((3,), some_tokens().shape[1]))
    assert expected.std() > 1e-3
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_a_score_model_with_ngrams_is_no_transformer(tmp_path, capsys):
    arch = NEOX
    for family in ("ngram", "both"):
        score_model = build_score_model(ScoreConfig(family=family), arch, seed=2)
        state = {"score_model": score_model.state_dict(), "architecture": asdict(arch), "score": {"family": family}}
        checkpoint.save_state(tmp_path / "final.pt", state)
        assert convert(("score", tmp_path), ("huggingface", tmp_path / "score")) == 1
        assert f"found a score model of family {family}" in capsys.readouterr().err


def test_what_is_there_is_not_overwritten_and_failures_leave_nothing(tmp_path, capsys):
    save_huggingface(NEOX, tmp_path / "in")
    (tmp_path / "out").mkdir()
    source = ("huggingface", tmp_path / "in")
    assert convert(source, ("target", tmp_path / "out")) == 1
    assert "expected a name that is free" in capsys.readouterr().err
    assert convert(source, ("huggingface", tmp_path / "new")) == 1
    assert "expected one of: huggingface to target" in capsys.readouterr().err
    assert convert(source, ("target", tmp_path / "new"), "--dtype", "fp16") == 1
    assert convert(("target", tmp_path / "in"), ("huggingface", tmp_path / "new")) == 1
    assert "found neither config.json nor a finished checkpoint" in capsys.readouterr().err
    assert convert(("proxy", tmp_path / "in"), ("huggingface", tmp_path / "new")) == 1
    with grouped(layout()) as groups:
        arch = replace(NEOX, num_query_groups=2)
        save_target(tmp_path / "grouped", 0, make_target(layout(), groups, arch), groups, shared={})
    assert convert(("target", tmp_path / "grouped"), ("huggingface", tmp_path / "new")) == 1
    assert "2 query groups" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grouped", "in", "out"]


@torch.no_grad()
def test_a_run_begins_from_pretrained_weights(tmp_path):
    """Rows past the tokenizer's vocabulary are dropped: a folder with 120 rows serves a tokenizer of 100 ids."""
    save_huggingface(replace(NEOX, vocab_size=120), tmp_path / "in")
    expected = huggingface_logits(tmp_path / "in")[..., :VOCAB_SIZE]
    settings = TargetConfig(pretrained_checkpoint=str(tmp_path / "in"))
    arch = configured_architecture("target", settings, VOCAB_SIZE)
    assert arch == NEOX
    with grouped(layout()) as groups:
        target = make_target(layout(), groups, arch)
        load_pretrained(target, tmp_path / "in", groups)
        logits = last_hidden_states(target, some_tokens(), groups) @ output_weight(target, groups, VOCAB_SIZE).t()
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        save_target(tmp_path / "checkpoint", 0, target, groups, shared={})
        with torch.enable_grad():
            corpus, losses = make_corpus(tmp_path / "corpus"), []
            for name, start in (("a", tmp_path / "in"), ("b", tmp_path / "checkpoint"), ("c", None)):
                segment = replace(segment_of(corpus, 4), pretrained=start)
                _, logged = train(setup_of(groups), segment, tmp_path / name)
                losses.append([line["loss"] for line in logged if "loss" in line])
    proxy = build_lm(arch, seed=1)
    load_pretrained_proxy(proxy, tmp_path / "in")
    torch.testing.assert_close(proxy(some_tokens()), expected, atol=1e-4, rtol=0)
    assert losses[0] == losses[1] != losses[2] and len(losses[0]) == 4


def test_a_pretrained_model_of_other_sizes_is_refused(tmp_path):
    save_huggingface(NEOX, tmp_path / "in")
    for config, vocab_size, message in (
        (TargetConfig(), 101, "found 100 tokens in target.pretrained_checkpoint=.*expected the 101 of the corpus"),
        (ProxyConfig(), 101, "in proxy.pretrained_checkpoint"),
        (TargetConfig(preset="pythia-14m"), VOCAB_SIZE, "found num_layers=2 .*expected 6: change target.num_layers"),
    ):
        with pytest.raises(ValueError, match=message):
            config = replace(config, pretrained_checkpoint=str(tmp_path / "in"))
            configured_architecture("target" if isinstance(config, TargetConfig) else "proxy", config, vocab_size)
