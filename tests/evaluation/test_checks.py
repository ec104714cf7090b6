"""What an evaluation needs is looked at before hours of work, and what is wrong has a name and an option."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bliss.config.evaluation import EvaluationConfig
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.evaluation import checks
from tests.data.corpora import documents, write_lines
from tools import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus, its tokenizer and two tasks."""
    folder = tmp_path_factory.mktemp("checks")
    source = write_lines(folder / "pool.jsonl", documents(40))
    tokenizer = str(folder / "bpe.json")
    assert train_tokenizer.main(["--input", source, "--output", tokenizer, "--vocab-size", "300"]) == 0
    for name, kind, file in (("pool", "huggingface", tokenizer), ("bytes", "bytes", None)):
        settings = PreprocessSettings([source], str(folder / name), tokenizer_type=kind, tokenizer_model=file)
        preprocess(settings, progress="none")
    (folder / "a.choice.jsonl").write_text(json.dumps({"query": "q", "choices": ["x", "y"], "answer": 1}) + "\n")
    (folder / "b.last_word.jsonl").write_text('{"text": "some words"}\n')
    (folder / "broken.choice.jsonl").write_text('{"query": "q", "choices": ["x"], "answer": 1}\n')
    return folder


@pytest.fixture
def config(folder) -> EvaluationConfig:
    return EvaluationConfig(tasks=["a", "b"], data_dir=str(folder))


def test_a_run_that_has_what_it_needs_passes(folder, config):
    checks.check_evaluation(config, str(folder / "pool"))
    checks.check_evaluation(config, str(folder / "bytes"))
    assert checks.load_evaluation_tokenizer(None, str(folder / "pool")).vocab_size == 300


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tasks": ["a", "gone"]}, "no data file of task gone in .*tools/prepare_evaluation.py"),
        ({"tasks": ["a", "piqa"]}, "no data file of task piqa in .*expected piqa.validation.jsonl"),
        ({"tasks": ["broken"]}, "broken.choice.jsonl, line 1"),
        ({"tasks": ["a", "a"]}, "found evaluation.tasks a, a, expected different names"),
        ({"tasks": ["average"]}, "none of them 'average'"),
        ({"data_dir": ""}, "found evaluation.data_dir '', expected a folder with the data files of a, b"),
        ({"tokenizer_model": "/nowhere/t.json"}, "no file /nowhere/t.json, .*set evaluation.tokenizer_model"),
    ],
)
def test_what_is_wrong_is_named(folder, config, change, message):
    with pytest.raises(ValueError, match=message):
        checks.check_evaluation(replace(config, **change), str(folder / "pool"))


def test_another_tokenizer_is_refused(folder, config, tmp_path):
    text = (folder / "bpe.json").read_text()
    (tmp_path / "bpe.json").write_text(text + "\n")
    with pytest.raises(ValueError, match="has digest .* give its file with evaluation.tokenizer_model"):
        checks.check_evaluation(replace(config, tokenizer_model=str(tmp_path / "bpe.json")), str(folder / "pool"))


def test_without_lm_eval_it_says_what_to_install(folder, config, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"no lm-eval, .*pip install 'megatron_bliss\[eval\]'"):
        checks.check_evaluation(config, str(folder / "pool"))
