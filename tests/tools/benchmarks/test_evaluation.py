"""tools/benchmark.py evaluation: both sides answer the same requests, and the ratio is of what was timed."""

import json
import statistics

import pytest

pytest.importorskip("lm_eval", reason="needs the [eval] extra")

from tools import benchmark  # noqa: E402

TINY = ["evaluation", "--preset", "pythia-14m", "--vocab", "300", "--items", "1", "--repetitions", "1"]


def test_json_and_page_hold_what_was_measured(capsys, tmp_path) -> None:
    page = tmp_path / "evaluation.md"
    assert benchmark.main([*TINY, "--tasks", "boolq", "piqa", "--json", "--output", str(page)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["requests"] == 4 and result["tasks"] == ["boolq", "piqa"]
    assert result["largest_difference"] < 1e-3 and result["greedy_equal"] is True
    seconds = {name: statistics.median(values) for name, values in result["times"].items()}
    assert set(seconds) == {"huggingface", "alone", "adapter"}
    assert result["speedup"] == pytest.approx(seconds["huggingface"] / seconds["adapter"], rel=1e-3)
    assert result["requests_per_second"]["adapter"] == pytest.approx(4 / seconds["adapter"], rel=1e-3)
    assert "| lm-eval's hf backend |" in page.read_text() and "largest batch" in page.read_text()


def test_wrong_options_are_errors(capsys) -> None:
    assert benchmark.main([*TINY, "--data-dir", "x"]) == 1
    assert "--data-dir without --tokenizer-model" in capsys.readouterr().err
    assert benchmark.main([*TINY, "--batch-size", "0"]) == 1
    assert "expected at least 1" in capsys.readouterr().err
