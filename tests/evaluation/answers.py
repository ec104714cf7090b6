"""Requests to ask of every model, and what it is to have the same answers."""

from __future__ import annotations

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from tests.evaluation import worlds

TOLERANCE = 1e-3
TRAINED = ("neox_trained", "llama_trained")


def assert_same_answers(found: list, expected: list, tolerance: float = TOLERANCE) -> None:
    difference = np.abs(np.array([a[0] for a in found]) - np.array([a[0] for a in expected]))
    assert len(found) == len(expected) and difference.max() < tolerance, difference.max()
    assert [a[1] for a in found] == [a[1] for a in expected]


def assert_same_results(found: dict, expected: dict) -> None:
    """Every accuracy and its error the same, perplexity but for rounding."""
    assert list(found["tasks"]) == list(expected["tasks"])
    for name, task in found["tasks"].items():
        other = expected["tasks"][name]
        assert task["metrics"].keys() == other["metrics"].keys()
        for metric, value in task["metrics"].items():
            assert value == pytest.approx(other["metrics"][metric], rel=1e-3 if metric == "perplexity" else 0), name
        for key in ("bits_per_byte", "bits_per_byte_stderr"):
            assert task[key] == pytest.approx(other[key], rel=1e-3)
        assert (task["value"], task["num_items"], task["data"]) == (other["value"], other["num_items"], other["data"])
    assert found["average"] == expected["average"] and found["average_tasks"] == expected["average_tasks"]


def as_requests(pairs: list) -> list[Instance]:
    """lm-eval's requests of (context, continuation)."""
    return [Instance("loglikelihood", {}, tuple(pair), 0) for pair in pairs]


def some_generations(count: int = 5) -> list[Instance]:
    words, options = worlds.Words(3), {"until": ["\n", "e "], "max_gen_toks": 9}
    texts = [words.text(1, 30) for _ in range(count)]
    return [Instance("generate_until", {}, (text, options), 0) for text in texts]


def some_texts() -> list[Instance]:
    words = worlds.Words(4)
    return [Instance("loglikelihood_rolling", {}, (words.text(1, 60),), 0) for _ in range(6)]
