"""The tool writes what an evaluation reads: from a Hugging Face cache, made here as its library does, and from text."""

import json
import os

import pyarrow as pa
import pytest

from megatron_bliss.evaluation import read_task
from megatron_bliss.evaluation.data_files import read_rows
from megatron_bliss.evaluation.huggingface_cache import SOURCES, cached_files, default_cache
from tools import prepare_evaluation

CHOICES = {"text": ["sand", "water", "fire"], "label": ["A", "B", "C"]}
ROWS = {
    "sciq": {"question": "What is wet?", "distractor1": "a", "distractor2": "b", "distractor3": "c",
             "correct_answer": "water", "support": ""},
    "arc_easy": {"id": "1", "question": "What is wet?", "choices": CHOICES, "answerKey": "B"},
    "arc_challenge": {"id": "1", "question": "What is wet?", "choices": CHOICES, "answerKey": "C"},
    "logiqa": {"label": "b", "context": "c", "question": "q", "options": ["1", "2", "3", "4"]},
    "openbookqa": {"id": "1", "question_stem": "Water is", "choices": CHOICES, "answerKey": "A"},
    "boolq": {"question": "is it", "passage": "It is.", "idx": 0, "label": 1},
    "hellaswag": {"ind": 1, "activity_label": "Swim", "ctx_a": "A man jumps.", "ctx_b": "he", "ctx": "",
                  "endings": ["swims.", "flies [title] up.", "x", "y"], "label": "0"},
    "piqa": {"goal": "Get wet", "sol1": "Jump in.", "sol2": "Stay out.", "label": 0},
    "winogrande": {"sentence": "Anna thanked Eva as _ had helped.", "option1": "Anna", "option2": "Eva", "answer": "2"},
    "lambada_openai": {"text": "He jumped into the water"},
}  # fmt: skip


def cache_rows(cache, task: str, rows: list[dict], version: str = "0.0.0", files: int = 1) -> None:
    """Write a split as the datasets library does: NAMESPACE___NAME/CONFIG/VERSION/HASH/NAME-SPLIT.arrow."""
    source = SOURCES[task]
    name = source.datasets[0].replace("/", "___")
    config = {"*": "plain_text"}.get(source.config, source.config)
    folder = cache / name / config / version / "0123abcd"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        part = pa.Table.from_pylist(rows[number * len(rows) // files : (number + 1) * len(rows) // files])
        shard = f"-{number:05d}-of-{files:05d}" if files > 1 else ""
        path = folder / f"{name.split('___')[-1]}-{source.split}{shard}.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, part.schema) as writer:
            writer.write_table(part)


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    for task, row in ROWS.items():
        cache_rows(folder, task, [row, row])
    return folder


def run(*arguments: object) -> int:
    return prepare_evaluation.main([str(argument) for argument in arguments])


def test_all_ten_tasks_are_read_from_a_cache_and_written_the_same_every_time(cache, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--from-huggingface-cache", "--cache-dir", cache, "--output", out) == 0
    printed = capsys.readouterr().out
    for task in SOURCES:
        data = read_task(task, out)  # recorded, so that a copy other than the known one is accepted
        assert len(data.rows) == 2 and not data.known and data.file.name in printed
    assert "not the known set (1,000 rows): recorded as it is" in printed
    assert read_task("arc_challenge", out).rows[0]["gold"] == 2
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(first) == 11
    assert run("--from-huggingface-cache", "--cache-dir", cache, "--output", out) == 0
    assert first == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_changed_file_is_refused(cache, tmp_path):
    out = tmp_path / "out"
    assert run("--from-huggingface-cache", "--cache-dir", cache, "--output", out, "--tasks", "piqa") == 0
    (out / "piqa.validation.jsonl").write_bytes(json.dumps(ROWS["piqa"]).encode())
    (out / "piqa.validation.jsonl.gz").unlink()
    with pytest.raises(ValueError, match="expected 1838 rows"):
        read_task("piqa", out)


def test_what_is_missing_has_a_name(cache, tmp_path, capsys):
    out = tmp_path / "out"
    for path in cached_files(cache, SOURCES["boolq"]) + cached_files(cache, SOURCES["arc_easy"]):
        path.unlink()
    assert run("--from-huggingface-cache", "--cache-dir", cache, "--output", out) == 1
    error = capsys.readouterr().err
    assert "boolq: expected aps___super_glue/boolq/VERSION/HASH/*-validation.arrow" in error
    assert 'datasets.load_dataset("allenai/ai2_arc", "ARC-Easy")' in error and "piqa" not in error
    assert len(list(out.glob("*.jsonl.gz"))) == 8
    assert run("--from-huggingface-cache", "--cache-dir", tmp_path / "nowhere", "--output", out) == 1
    assert "expected the cache of the datasets library: give --cache-dir" in capsys.readouterr().err


def test_rows_that_are_not_the_tasks_are_refused(cache, tmp_path, capsys):
    cache_rows(cache, "piqa", [{"goal": "Get wet", "sol1": "Jump in.", "label": 0}])
    assert run("--from-huggingface-cache", "--cache-dir", cache, "--output", tmp_path, "--tasks", "piqa") == 1
    assert "found no field 'sol2'" in capsys.readouterr().err and not list(tmp_path.glob("piqa*"))
    cached_files(cache, SOURCES["piqa"])[0].write_bytes(b"no arrow")
    assert run("--from-huggingface-cache", "--cache-dir", cache, "--output", tmp_path, "--tasks", "piqa") == 1
    assert "is no Arrow file" in capsys.readouterr().err


def test_the_newest_copy_with_all_its_parts_is_taken(cache, tmp_path):
    rows = [{"text": f"He jumped {number}"} for number in range(5)]
    cache_rows(cache, "lambada_openai", rows, version="1.0.0", files=2)
    newest = cached_files(cache, SOURCES["lambada_openai"])[0].parent
    assert newest.parent.name == "1.0.0"
    assert run("--from-huggingface-cache", "--cache-dir", cache, "--output", tmp_path, "--tasks", "lambada_openai") == 0
    assert read_rows("lambada_openai", tmp_path)[1] == rows
    os.utime(newest.parent.parent / "0.0.0/0123abcd", ns=(2**62, 2**62))
    assert cached_files(cache, SOURCES["lambada_openai"])[0].parts[-3] == "0.0.0"


def test_the_cache_is_where_hugging_faces_variables_say(monkeypatch):
    for name in ("HF_DATASETS_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert str(default_cache()) == "/home/me/.cache/huggingface/datasets"
    monkeypatch.setenv("HF_HOME", "/hf")
    assert str(default_cache()) == "/hf/datasets"
    monkeypatch.setenv("HF_DATASETS_CACHE", "/sets")
    assert str(default_cache()) == "/sets"


def test_tasks_from_text_are_read_back(tmp_path, capsys):
    sentence = "The keeper of the small lighthouse walked slowly down to the harbour and looked at the old grey"
    words = ["harbour", "keeper", "lighthouse", "water", "stones", "boats"]
    texts = [" ".join(f"{sentence} {word} of the {words[k - 1]}." for word in words) for k in range(6)]
    source = tmp_path / "held.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--from-text", source, "--output", tmp_path / "out", "--context-words", 5, "--min-words", 10]
    assert run(*options, "--name", "sea", "--max-items", 7, "--continuation-words", 1) == 0
    assert "task sea_choice, 7 items, chance 25%" in capsys.readouterr().out
    assert [len(read_task(name, tmp_path / "out").rows) for name in ("sea_last_word", "sea_choice")] == [7, 7]
    assert run(*options, "--name", "alone", "--kind", "last_word") == 0
    assert read_task("alone", tmp_path / "out").kind == "last_word"
    assert run(*options) == 1 and "give --name" in capsys.readouterr().err
