"""An export on tasks from the command line; targets and proxies of a run are in run/test_rounds.py."""

import json

import pytest

from tools import evaluate


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer_file):
    """A random GPT-NeoX as Hugging Face writes it, with a tokenizer."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    folder = tmp_path_factory.mktemp("exported")
    config = GPTNeoXConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    from tests.data.corpora import documents, write_lines
    from tools import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    source = write_lines(folder / "pool.jsonl", documents(40))
    arguments = ["--input", source, "--output", str(folder / "tokenizer.json"), "--vocab-size", "300"]
    assert train_tokenizer.main(arguments) == 0
    return folder / "tokenizer.json"


@pytest.fixture
def tasks(tmp_path):
    item = {"query": "one two", "choices": ["three", "four", "fives"]}
    lines = [json.dumps(item | {"answer": number % 3}) for number in range(9)]
    (tmp_path / "mine.choice.jsonl").write_text("\n".join(lines))
    return tmp_path


def run(*arguments: object) -> int:
    return evaluate.main([str(argument) for argument in arguments])


def test_an_export_is_evaluated(exported, tasks, capsys):
    options = ["--huggingface", exported, "--tasks", "mine", "--data-dir", tasks, "--output", tasks / "out"]
    assert run(*options, "--label", "random weights") == 0
    result = json.loads((tasks / "out/results.json").read_text())
    assert result["tasks"]["mine"]["value"] == pytest.approx(1 / 3)  # the same three choices, each right as often
    assert result["tasks"]["mine"]["chance"] == pytest.approx(1 / 3)
    table = capsys.readouterr().out
    assert "| random weights | 33.3 ± 16.7 | 33.3 ± 16.7 |" in table and "9 items, chance 33%" in table
    assert (tasks / "out/results.md").read_text() == table
    assert run(*options, "--limit", 1, "--request-cache", tasks / "cache") == 0
    assert json.loads((tasks / "out/results.json").read_text())["tasks"]["mine"]["num_items"] == 1


def test_what_is_missing_is_said(exported, tasks, capsys):
    assert run("--huggingface", exported, "--output", tasks / "out") == 2
    assert "found no tasks, expected at least one: give --tasks" in capsys.readouterr().err
    assert run("--huggingface", exported, "--tasks", "gone", "--data-dir", tasks, "--output", tasks / "out") == 2
    assert "found no data file of task gone" in capsys.readouterr().err
    assert run("--target", tasks / "step_1", "--tasks", "mine", "--data-dir", tasks, "--output", tasks / "out") == 2
    assert "found no run folder above" in capsys.readouterr().err and not (tasks / "out").exists()
