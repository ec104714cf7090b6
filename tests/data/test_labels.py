"""Task items and mixtures: what is labelled, and in what shares."""

import gzip
import json
import re

import numpy as np
import pytest

from megatron_bliss.data.ingest.sources import BadLine
from megatron_bliss.data.labels import context_and_answer
from megatron_bliss.data.tokenizers import load_tokenizer
from megatron_bliss.data.validation import ValidationCorpus, ValidationSettings, prepare_validation
from tests.data.corpora import PASSAGES, documents, write_lines
from tools import prepare_validation as command

ITEMS = [
    ({"context": "They reached the", "target": " harbour"}, "They reached the", " harbour"),
    ({"prompt": "2 + 2 =", "completion": " 4"}, "2 + 2 =", " 4"),
    (
        {"question": "What flows?", "correct_answer": "a river", "distractor1": "a map", "support": "Rivers flow."},
        "Rivers flow.\nQuestion: What flows?\nAnswer:",
        " a river",
    ),
    ({"question": "What?", "correct_answer": "it", "support": ""}, "Question: What?\nAnswer:", " it"),
    (
        {"question": "is it late", "passage": "It was night.", "label": 1},
        "It was night.\nQuestion: is it late?\nAnswer:",
        " yes",
    ),
    ({"question": "Which?", "choices": ["this", "that"], "gold": 1}, "Question: Which?\nAnswer:", " that"),
    (
        {"question": "Which?", "choices": {"text": ["this", "that"], "label": ["1", "2"]}, "answerKey": "2"},
        "Question: Which?\nAnswer:",
        " that",
    ),
    ({"question_stem": "A bridge is", "choices": ["old", "new"], "answerKey": "A"}, "A bridge is", " old"),
    (
        {"context": "Some do.", "question": "Who?", "options": ["one", "two"], "label": "b"},
        "Passage: Some do.\nQuestion: Who?\nChoices:\nA. one\nB. two\nAnswer:",
        " two",
    ),
    ({"query": "He", "choices": ["runs.", "flies."], "gold": 0}, "He", " runs."),
    ({"ctx": "He", "endings": ["runs.", "flies."], "label": "1"}, "He", " flies."),
    (
        {"goal": "How to cut?", "sol1": "saw it", "sol2": "eat it", "label": 0},
        "Question: How to cut?\nAnswer:",
        " saw it",
    ),
    (
        {"sentence": "Ann paid Bea because _ had won.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        "Ann paid Bea because Bea",
        " had won.",
    ),
    ({"text": "He asked for bread "}, "He asked for ", "bread"),
]


@pytest.mark.parametrize(
    "item, context, answer", ITEMS, ids=lambda value: " ".join(value) if type(value) is dict else ""
)
def test_items_of_every_task_are_context_and_answer(item, context, answer):
    assert context_and_answer(item) == (context, answer)


@pytest.mark.parametrize(
    "item, message",
    [
        ({"title": "a", "body": "b"}, "an item with title, body, expected one of: context [+] target; "),
        ({}, "an item with no keys"),
        ({"question": "Which?", "choices": ["this"], "gold": 1}, "answer 1 of 1 choices"),
        ({"question": "Which?", "choices": ["this"], "gold": "x"}, "are not what they should be"),
        ({"question": "Which?", "choices": None, "gold": 0}, "question, choices, gold are not what they should be"),
        ({"sentence": "No blank.", "option1": "a", "option2": "b", "answer": "1"}, "a sentence without a blank"),
        ({"query": "He", "choices": [" ", "b"], "gold": 0}, "an empty answer"),
        ({"text": "word"}, "a single word"),
        ({"text": 7}, "text are not what they should be"),
    ],
)
def test_items_that_cannot_be_used_are_named(item, message):
    with pytest.raises(BadLine, match=message):
        context_and_answer(item)


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece", "bytes"])
def test_only_the_answer_is_labelled(tmp_path, tokenizer_files, kind):
    tokenizer = load_tokenizer(kind, tokenizer_files[kind])
    source = write_lines(tmp_path / "task.jsonl", [item for item, _, _ in ITEMS])
    options = ["--input", source, "--output-prefix", str(tmp_path / "V"), "--label", "answer", "--tokenizer-type", kind]
    assert (
        command.main([*options, *(["--tokenizer-model", tokenizer_files[kind]] if tokenizer_files[kind] else [])]) == 0
    )
    validation = ValidationCorpus(tmp_path / "V")
    tokens, mask, lengths = validation.gather(np.arange(len(ITEMS)), 1024)
    for row, (_, context, answer) in enumerate(ITEMS):
        assert tokenizer.decode(tokens[row][mask[row]]).strip() == answer.strip()
        assert tokenizer.decode(tokens[row, : lengths[row]]).strip() == f"{context}{answer}".strip()
        assert mask[row, lengths[row] - 1] and not mask[row, lengths[row] :].any()


def mixture(tmp_path, name, **changes):
    """A validation set of 30 passages (last word), 60 items (answer) and 10 documents (all)."""
    inputs = [
        write_lines(tmp_path / "passages.jsonl", [{"text": PASSAGES[n % 4]} for n in range(30)]),
        write_lines(tmp_path / "items.jsonl", [ITEMS[5][0]] * 60),
        write_lines(tmp_path / "text.jsonl", documents(10)),
    ]
    settings = {"label": ["last-word", "answer", "all"], "tokenizer_type": "bytes", "max_length": 16} | changes
    prepare_validation(ValidationSettings(inputs=inputs, output_prefix=str(tmp_path / name), **settings))
    return ValidationCorpus(tmp_path / name)


def test_mixtures_have_the_shares_that_were_asked_for(tmp_path):
    whole = mixture(tmp_path, "whole").manifest
    assert [entry["units"] for entry in whole["inputs"][:2]] == [30, 60] and whole["unit"] == "mixed"
    for by, name in (("units", "units"), ("labels", "labelled")):
        weights = [0.5, 0.3, 0.2]
        validation = mixture(tmp_path, f"by-{by}", weights=weights, weight_by=by, seed=3)
        parts = validation.manifest["inputs"]
        total = sum(entry[name] for entry in parts)
        np.testing.assert_allclose(
            [entry[name] / total for entry in parts], weights, atol=0.12 if by == "labels" else 0.02
        )
        assert sum(entry["units"] for entry in parts) == len(validation)
        assert validation.labels.sum() == sum(entry["labelled"] for entry in parts)
    assert parts[2]["units"] < 10  # one piece of text has as many labels as two passages
    alone = mixture(tmp_path, "alone", weights=[0, 2, 0])
    assert [entry["units"] for entry in alone.manifest["inputs"]] == [0, 60, 0]
    again = mixture(tmp_path, "again", weights=[0.5, 0.3, 0.2], weight_by="labels", seed=3)
    assert again.manifest["digest"] == validation.manifest["digest"]
    other = mixture(tmp_path, "other", weights=[0.5, 0.3, 0.2], weight_by="labels", seed=4)
    assert other.manifest["digest"] != validation.manifest["digest"]
    with pytest.raises(ValueError, match="finished with another settings"):
        mixture(tmp_path, "again", weights=[0.5, 0.3, 0.2], weight_by="labels", seed=4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weights": [0.5]}, "weights .* for 3 inputs"),
        ({"weights": [0.0, 0.0, 0.0]}, "expected one for each"),
        ({"weights": [1.0, -1.0, 1.0]}, "0 or more: --weights"),
        ({"weights": [1.0, 1.0, 1e-9]}, "leaves no unit of some input"),
        ({"weights": [1e6, 1.0, 1.0]}, "leaves no unit of some input"),
        ({"label": ["all", "answer"]}, "2 labels for 3 inputs"),
        ({"label": "first"}, "label is 'first', expected last-word, answer, item, all"),
    ],
)
def test_mixtures_that_cannot_be_are_refused_and_leave_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        mixture(tmp_path, "V", **changes)
    assert not list(tmp_path.glob("V.bin")) and not list(tmp_path.glob("*.tmp"))


def test_the_command_shows_the_parts(tmp_path, capsys):
    first = tmp_path / "a.jsonl.gz"
    first.write_bytes(gzip.compress(b"".join(json.dumps(item).encode() + b"\n" for item, _, _ in ITEMS)))
    second = write_lines(tmp_path / "b.jsonl", [{"text": text} for text in PASSAGES])
    options = ["--output-prefix", str(tmp_path / "V"), "--tokenizer-type", "bytes", "--label", "answer"]
    assert command.main(["--input", str(first), "--input", second, *options, "--weights", "0.5", "0.5"]) == 0
    output = capsys.readouterr().out
    assert "8 units" in output and len(re.findall(r"4 units +\d+ labelled +answer", output)) == 2
    assert command.main(["--input", second, *options, "--weights", "0.5", "0.5"]) == 1
    assert "for 1 inputs" in capsys.readouterr().err


def test_an_item_is_labelled_as_a_text_with_its_answer(tmp_path):
    source = write_lines(tmp_path / "task.jsonl", [item for item, _, _ in ITEMS])
    options = {"output_prefix": str(tmp_path / "V"), "tokenizer_type": "bytes", "label": "item", "max_length": 4096}
    prepare_validation(ValidationSettings(inputs=[source], **options))
    tokens, mask, lengths = ValidationCorpus(tmp_path / "V").gather(np.arange(len(ITEMS)), 4096)
    for row, (_, context, answer) in enumerate(ITEMS):
        assert bytes(tokens[row, : lengths[row]].astype(np.uint8)).decode() == f"{context}{answer}".rstrip()
        assert not mask[row, 0] and mask[row, 1 : lengths[row]].all()
