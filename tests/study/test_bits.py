"""Bits per byte of text sets and of tasks, against numbers made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.data.tokenizers import BytesTokenizer
from megatron_bliss.data.validation import ValidationCorpus
from megatron_bliss.study.bits import bits_section, in_bits, labelled_bytes
from megatron_bliss.study.description import read_study
from megatron_bliss.study.runs import study_runs
from megatron_bliss.study.task_results import last_results, tasks_section
from tests.study.studies import run_tool, write_study


def cells(section: list[str], block: int = -1) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in section[block].splitlines()]


class Words(BytesTokenizer):
    """One id per word of a list; a space stands between two words."""

    words = ("the", "é", "cat", "")

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[token] for token in ids)


def test_labelled_bytes_are_those_that_the_labelled_tokens_add() -> None:
    def size(ids: list[int], labels: list[int], eod: int = 3) -> int:
        tokenizer = Words()
        tokenizer.eod = eod
        return labelled_bytes(tokenizer, np.array(ids), np.array(labels, dtype=bool))

    assert size([0, 1, 2], [0, 1, 1]) == len(" é cat".encode()) == 7
    assert size([0, 1, 2], [0, 0, 1]) == 4 and size([0, 1, 2], [0, 1, 0]) == 3 and size([0, 1, 2], [0, 0, 0]) == 0
    assert size([0, 1, 2, 1], [0, 1, 0, 1]) == 6
    assert size([0, 1, 2, 3], [0, 1, 1, 1]) == 7  # the end of the document is no text


@pytest.fixture
def study() -> dict:
    def point(seed: int, variant: str, arm: str, loss: float, accuracy: float, bits: float) -> dict:
        curves = {"near": [[10, 9.0], [40, loss]], "far": [[10, 9.0], [40, loss + 1]]}
        cost = {axis: [[10, 1.0], [40, 4.0]] for axis in ("flops", "seconds")}
        cost |= {f"selection_{axis}": [[10, 0.0], [40, 0.0]] for axis in ("flops", "seconds")}
        tasks = {"accuracy": {"next": accuracy, "average": accuracy}, "bits_per_byte": {"next": bits}}
        return {"seed": seed, "variant": variant, "arm": arm, "losses": curves, "cost": cost, "tasks": tasks}

    return {
        "control": "a/random",
        "longer": {},
        "seeds": [1, 2],
        "guided": ["near"],
        "other": ["far"],
        "bytes_per_token": {"a": {"near": 2.0, "far": 4.0}, "b": {"near": 4.0}},
        "tasks": {"next": {"metric": "acc", "num_items": 10, "chance": 0.25}},
        "points": [
            point(1, "a", "random", 4.0, 0.50, 2.0),
            point(1, "b", "bliss", 6.0, 0.60, 1.5),
            point(2, "a", "random", 4.4, 0.52, 2.2),
            point(2, "b", "bliss", 6.0, 0.50, 1.5),
        ],
    }


def test_losses_of_other_tokenizers_compare_in_bits_per_byte(study: dict) -> None:
    """6 nats for 4 bytes are less than 4 nats for 2; the bytes of the other set are not known in all variants."""
    head, _, random, bliss = cells(bits_section(study))
    assert head == ["arm", "near"]
    control = [loss / 2 / math.log(2) for loss in (4.0, 4.4)]
    assert random[1] == f"{sum(control) / 2:.3f} ± {abs(control[0] - control[1]) / 2:.3f}"
    value = 6 / 4 / math.log(2)
    assert bliss[1].startswith(f"{value:.3f} ± 0.000 ({value - sum(control) / 2:+.3f} ± ") and bliss[1].endswith(
        "; 2/2)"
    )
    assert bits_section({**study, "bytes_per_token": {}}) == [] and in_bits(study)["other"] == []
    del study["bytes_per_token"]
    assert bits_section(study) == []


def test_tasks_are_paired_by_seed_and_higher_accuracy_is_better(study: dict) -> None:
    section = tasks_section(study)
    assert section[0] == "## Tasks" and "next: acc of 10 items, chance 25%" in section[1]
    assert section[2] == "### Accuracy on tasks, percent"
    accuracy, bits = cells(section, 3), cells(section, 5)
    assert accuracy[0] == ["arm", "next", "average"] and bits[0] == ["arm", "next"]
    assert accuracy[2][1] == "51.0 ± 1.0" and accuracy[3][1] == "55.0 ± 5.0 (+4.0 ± 6.0; 1/2)"
    assert bits[2][1] == "2.100 ± 0.100" and bits[3][1] == "1.500 ± 0.000 (-0.600 ± 0.100; 2/2)"
    study["points"][1]["tasks"]["bits_per_byte"]["next"] = 9.0
    assert "(**+3.150 ± 3.850**; 1/2)" in cells(tasks_section(study), 5)[3][1]
    for point in study["points"]:
        point["tasks"] = last_results({})
    assert tasks_section(study) == []


def test_a_study_with_tasks_tells_both_measures_and_bytes(corpus: Path, tmp_path: Path) -> None:
    """Bytes are tokens here; of a set's samples the first token is not labelled."""
    base = {"config": str(corpus / "config.yaml"), "rounds": 1, "pretraining.train_iters": 4}
    given = write_study(tmp_path, corpus, base=base, variants={"a": {}}, seeds=[1])
    output = tmp_path / "out"
    result = run_tool(given, output)
    assert result.returncode == 0, result.stderr
    found = json.loads((output / "study.json").read_text())
    assert found["bytes_per_token"] == {"a": {"held": pytest.approx(1.0), "held_other": pytest.approx(1.0)}}
    assert ValidationCorpus(corpus / "held").manifest["tokenizer"]["kind"] == "bytes"
    (run,) = study_runs(read_study(given), output)
    for point in found["points"]:
        results = json.loads((run.folder / point["arm"] / "round_01/evaluate/results.json").read_text())
        for name in ("next", "last"):
            task = results["tasks"][name]
            assert point["tasks"]["accuracy"][name] == task["value"]
            assert point["tasks"]["bits_per_byte"][name] == task["bits_per_byte"] > 0
    page = (output / "study.md").read_text()
    for heading in ("## In bits per byte", "### Accuracy on tasks, percent", "### Bits per byte of the right answers"):
        assert heading in page
    assert "next: acc_norm of 10 items, chance 25%" in page
    logged = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert any("tasks/next_bits_per_byte" in line for line in logged)
