"""Local files become the very requests of lm-eval's own tasks; wrong files are named with what was expected."""

from __future__ import annotations

import gzip
import json
import math
import socket
import warnings
from pathlib import Path

import jinja2
import lm_eval
import numpy as np
import orjson
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from megatron_bliss.evaluation import TASK_NAMES, checksums, evaluate_tasks, find_tasks, read_task, write_checksums
from megatron_bliss.evaluation import harness as harness_module
from megatron_bliss.evaluation.data_files import STEMS, find_file, read_rows
from megatron_bliss.evaluation.rows import READERS
from tests.evaluation import worlds
from tests.evaluation.conftest import World, huggingface_reference
from tests.targets import grouped, layout

FOLDERS = {
    "arc_easy": "arc", "arc_challenge": "arc", "boolq": "super_glue/boolq", "lambada_openai": "lambada",
}  # fmt: skip
FILES = {"boolq": "default", "winogrande": "default"}


@pytest.mark.parametrize("name", TASK_NAMES)
def test_requests_are_those_of_lm_evals_own_task(world: World, name: str, tmp_path) -> None:
    """lm-eval's definition, with its dataset replaced by the same rows as a local file."""
    path = Path(lm_eval.__file__).parent / "tasks" / FOLDERS.get(name, name) / f"{FILES.get(name, name)}.yaml"
    config = load_yaml(path)
    for key in ("dataset_name", "tag", "training_split", "validation_split", "test_split"):
        config.pop(key, None)
    words = worlds.Words(0)
    rows = [worlds.ROWS[name](words) for _ in range(8)]
    worlds.write_jsonl(tmp_path / f"{STEMS[name]}.jsonl", rows)
    config |= {
        "dataset_path": "json",
        "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{STEMS[name]}.jsonl")}, "cache_dir": str(tmp_path)},
    }
    theirs = ConfigurableTask(config=config)
    theirs.build_all_requests(rank=0, world_size=1)
    ours = worlds.make_requests(tmp_path, tmp_path / "ours", [name])
    assert [(r.request_type, r.args, r.doc_id, r.idx) for r in ours] == [
        (r.request_type, r.args, r.doc_id, r.idx) for r in theirs.instances
    ]
    made = worlds.make_task(name, read_task(name, tmp_path, allow_unknown=True), tmp_path / "ours")
    gold = [(made.doc_to_target(a), theirs.doc_to_target(b)) for a, b in zip(made.task_docs, theirs.task_docs)]  # noqa: B905
    assert all(ours == theirs for ours, theirs in gold) and len(gold) == 8
    assert set(made.aggregation()) == set(theirs.aggregation()) and made.VERSION == theirs.VERSION


FLAT = {
    "arc_easy": {"question": "q", "choices": ["a", "b", "c"], "gold": 1},
    "openbookqa": {"question_stem": "q", "choices": ["a", "b", "c", "d"], "answerKey": "B"},
    "boolq": {"question": "q", "passage": "p", "answer": True},
    "hellaswag": {"query": "a: b C", "choices": ["x", " y z"], "gold": 1},
}
NESTED = {
    "arc_easy": {"question": "q", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"},
    "openbookqa": {
        "question_stem": "q",
        "choices": {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B ",
    },
    "boolq": {"question": "q", "passage": "p", "label": 1, "idx": 4},
    "hellaswag": {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["x", "[header] y  z"], "label": "1"},
}


@pytest.mark.parametrize("name", FLAT)
def test_flat_and_nested_spellings_are_one_row(name: str) -> None:
    assert READERS[name](FLAT[name]) == READERS[name](NESTED[name])


def test_tasks_of_ones_own_are_read_by_the_kind_in_their_name(world: World) -> None:
    _, (first, *_) = read_rows("cloze", world.data_dir)
    raw = orjson.loads(gzip.decompress((world.data_dir / "cloze.last_word.jsonl.gz").read_bytes()).splitlines()[0])
    assert first["context"] + first["word"] == raw["text"] and first["word"].count(" ") == 1
    assert find_tasks(world.data_dir) == [*TASK_NAMES, "cloze", "continuation"]
    tasks = world.documents["neox_trained"]["tasks"]
    assert tasks["cloze"]["metric"] == "acc" and set(tasks["cloze"]["metrics"]) == {"perplexity", "acc", "acc_stderr"}
    assert tasks["continuation"]["metric"] == "acc_norm" and tasks["continuation"]["num_items"] == worlds.ITEMS


def test_document_says_what_was_measured(world: World) -> None:
    document = world.documents["neox_trained"]
    json.dumps(document, allow_nan=False)
    assert document["format"] == 1 and document["lm_eval_version"] == "0.4.13"
    assert document["average_tasks"] == [name for name in TASK_NAMES if name != "lambada_openai"]
    values = [document["tasks"][name]["value"] for name in document["average_tasks"]]
    assert document["average"] == pytest.approx(sum(values) / 9)
    for name, task in document["tasks"].items():
        expected = "acc" if name in ("boolq", "winogrande", "lambada_openai", "cloze") else "acc_norm"
        assert (task["metric"], task["value"]) == (expected, task["metrics"][expected])
        spread = task["value"] * (1 - task["value"]) / (task["num_items"] - 1)
        assert task["stderr"] == pytest.approx(spread**0.5) and task["data"]["known"] is False


def test_bits_per_byte_by_hand(world: World, tmp_path) -> None:
    """From the answers that lm-eval's own model gave, and what the files say is right."""
    rows = {name: read_rows(name, world.data_dir)[1] for name in worlds.all_tasks()}
    right = {
        "piqa": lambda row: row["label"],
        "boolq": lambda row: row["label"],
        "winogrande": lambda row: int(row["answer"]) - 1,
        "continuation": lambda row: row["gold"],
        "cloze": lambda row: 0,
        "lambada_openai": lambda row: 0,
    }
    start = 0
    for name in worlds.all_tasks():
        requests = worlds.make_requests(world.data_dir, tmp_path / name, [name])
        answers = world.answers["neox_trained"][start : start + len(requests)]
        start += len(requests)
        if name not in right:
            continue
        bits = []
        for request, (log_likelihood, _) in zip(requests, answers, strict=True):
            row = rows[name][request.doc_id]
            if request.idx == right[name](row):
                text = request.args[1]
                assert text.startswith(" ")
                if name == "boolq":
                    assert text == [" no", " yes"][row["label"]]
                bits.append(-log_likelihood / math.log(2) / len(text.encode()))
        assert len(bits) == worlds.ITEMS
        task = world.documents["neox_trained"]["tasks"][name]
        assert task["bits_per_byte"] == pytest.approx(sum(bits) / len(bits)) and task["bits_per_byte"] > 0
        assert task["bits_per_byte_stderr"] == pytest.approx(np.std(bits, ddof=1) / len(bits) ** 0.5)


def copied(world: World, folder: Path) -> Path:
    folder.mkdir()
    for file in world.data_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_missing_and_altered_files_are_named_with_what_was_expected(world: World, tmp_path, monkeypatch) -> None:
    folder = copied(world, tmp_path / "data")
    (folder / "piqa.validation.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"task piqa in .*piqa.validation.jsonl or .*1838 rows, content digest"):
        read_task("piqa", folder)
    with pytest.raises(FileNotFoundError, match=r"expected mine.last_word.jsonl .* tasks found there: sciq, arc_easy"):
        read_task("mine", folder)
    with pytest.raises(ValueError, match=r"boolq.* holds 200 rows with digest .*, expected 3270 rows with digest aa90"):
        read_task("boolq", folder)
    write_checksums(folder, ["boolq", "cloze"])
    assert read_task("boolq", folder).known is False and not read_task("sciq", folder, allow_unknown=True).known
    rows = [orjson.loads(line) for line in (folder / "boolq.validation.jsonl").read_bytes().splitlines()]
    worlds.write_jsonl(folder / "boolq.validation.jsonl", rows[::-1])
    assert read_task("boolq", folder).rows, "another order is the same set"
    rows[3]["label"] = 1 - rows[3]["label"]
    worlds.write_jsonl(folder / "boolq.validation.jsonl", rows)
    with pytest.raises(ValueError, match=r"boolq.* holds 200 rows .* expected 200 rows .* checksums.json beside it"):
        read_task("boolq", folder, allow_unknown=True)
    data = read_task("sciq", folder, allow_unknown=True)
    monkeypatch.setitem(checksums.KNOWN, "sciq", checksums.Expected(worlds.ITEMS, data.sha256))
    assert read_task("sciq", folder).known is True
    (folder / "checksums.json").write_text('{"files": [1]}')
    with pytest.raises(ValueError, match="checksums.json does not hold files with rows and sha256"):
        read_task("sciq", folder)


BAD_ROWS = {
    "no field": ("piqa", {"goal": "g", "sol1": "a", "label": 0}, "found no field 'sol2'"),
    "no object": ("piqa", [1], "found a list, expected an object"),
    "label": ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": 2}, "answer 2, expected 0 to 1"),
    "type": ("piqa", {"goal": 1, "sol1": "a", "sol2": "b", "label": 1}, "'goal' holds 1, expected a string"),
    "gap": ("winogrande", {"sentence": "s", "option1": "a", "option2": "b", "answer": "1"}, "a gap _"),
    "one word": ("lambada_openai", {"text": "word"}, "at least two words"),
    "own, one word": ("own", {"text": " word "}, "at least two words"),
    "choices": ("arc_easy", {"question": "q", "choices": ["a"], "gold": 0}, "at least two non-empty strings"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(case: str, tmp_path) -> None:
    task, row, message = BAD_ROWS[case]
    stem = STEMS.get(task, f"{task}.last_word")
    (tmp_path / f"{stem}.jsonl").write_bytes(b"\n" + orjson.dumps(row) + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        read_task(task, tmp_path)
    assert f"{stem}.jsonl, line 2: " in str(error.value) and "; expected: " in str(error.value)


def test_bad_files_are_named(world: World, tmp_path) -> None:
    folder = copied(world, tmp_path / "data")
    with pytest.raises(ValueError, match="task name '../piqa'"):
        find_file("../piqa", folder)
    (folder / "cloze.choice.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="expected one file for task cloze: remove the others"):
        find_file("cloze", folder)
    (folder / "piqa.validation.jsonl").write_bytes(b"\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_task("piqa", folder)
    whole = (folder / "sciq.test.jsonl.gz").read_bytes()
    (folder / "sciq.test.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="sciq.test.jsonl.gz is damaged"):
        read_task("sciq", folder)


def test_hostile_texts_stay_texts(world: World, tmp_path) -> None:
    """Templates, lists and numbers in a data file are scored as they stand."""
    nasty = ["{{ 7 * 7 }} {% for x in y %}", "[1, 2]", "3", "!function os.system"]
    write = [{"query": text, "choices": nasty, "answer": 1} for text in nasty]
    worlds.write_jsonl(tmp_path / "nasty.choice.jsonl", write)
    worlds.write_jsonl(tmp_path / "words.last_word.jsonl", [{"text": f"{text} {nasty[2]}"} for text in nasty])
    requests = worlds.make_requests(tmp_path, tmp_path / "tasks", ["nasty"])
    assert [request.args for request in requests] == [(text, " " + choice) for text in nasty for choice in nasty]
    requests = worlds.make_requests(tmp_path, tmp_path / "tasks", ["words"])
    assert [request.args for request in requests] == [(text, " 3") for text in nasty]


def blocked(*arguments, **_) -> None:
    raise AssertionError(f"something asked the network for {arguments}")


def test_everything_runs_without_network_and_leaves_no_trace(world: World, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with grouped(layout()) as groups:
        model = worlds.target_model(world.models["neox_trained"], layout(), groups)
        found = evaluate_tasks(model, ["cloze", "piqa"], world.data_dir, limit=3, allow_unknown_data=True)
    assert found["tasks"]["piqa"]["num_items"] == 3 and found["average_tasks"] == ["piqa"]
    assert list(tmp_path.iterdir()) == []


def test_templates_are_compiled_once_and_only_for_the_time_being(world: World, monkeypatch) -> None:
    compiled, compile_template = [], jinja2.Environment.compile

    def counting(self, source: str, *others, **options):
        compiled.append(source)
        return compile_template(self, source, *others, **options)

    monkeypatch.setattr(jinja2.Environment, "compile", counting)
    with grouped(layout()) as groups:
        model = worlds.target_model(world.models["neox_trained"], layout(), groups)
        evaluate_tasks(model, ["piqa", "arc_easy"], world.data_dir, limit=20, allow_unknown_data=True)
    assert 0 < len(compiled) == len(set(compiled)) < 20
    assert "from_string" not in vars(lm_eval.utils.env)


def test_another_version_of_lm_eval_is_warned_of(world: World, monkeypatch) -> None:
    monkeypatch.setattr(harness_module.lm_eval, "__version__", "0.5.0")
    reference = huggingface_reference(world.models["neox_trained"])
    with pytest.warns(UserWarning, match="found lm-eval 0.5.0, expected 0.4.13"):
        found = evaluate_tasks(reference, ["cloze"], world.data_dir, limit=2)
    assert found["lm_eval_version"] == "0.5.0" and found["average_tasks"] == ["cloze"]
    with warnings.catch_warnings(), pytest.raises(ValueError, match="request cache for a HFLM"):
        warnings.simplefilter("ignore")
        evaluate_tasks(reference, ["cloze"], world.data_dir, request_cache=Path("x"))


def test_nothing_to_do_is_refused(world: World) -> None:
    for tasks, limit in (([], None), (["cloze"], 0)):
        with pytest.raises(ValueError, match="expected at least"):
            evaluate_tasks(None, tasks, world.data_dir, limit=limit)
