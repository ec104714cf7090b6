"""tools/benchmark.py bilevel: the keys it promises, true peaks, and what happens when a case dies."""

import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from tools import benchmark
from tools.benchmarks import bilevel, measure, table
from tools.benchmarks.measure import Peak

TINY = ["--num-layers", "1", "--hidden-size", "16", "--num-attention-heads", "2", "--repetitions", "1"]
SIZES = ["--vocab", "211", "--seq", "24", "--batch", "2"]
PROMISED = (
    "relative_error",
    "peak_vs_gradient",
    "peak_vs_published",
    "hessian_time_vs_gradient",
    "gauss_newton_time_vs_gradient",
    "upper_step_speedup",
)
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is Linux's")


@pytest.fixture
def fixed_peaks(monkeypatch) -> None:
    """Peaks that start no process; how they are measured has its own tests."""
    monkeypatch.setattr(bilevel, "_peak_in_child", lambda name, *_: Peak(1000 + len(name), 5000))


def test_json_has_the_promised_figures_for_every_point_of_the_grid(fixed_peaks, capsys) -> None:
    assert benchmark.main(["bilevel", *TINY, "--vocab", "211", "--seq", "16", "24", "--batch", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["machine"]["torch"] == torch.__version__
    assert [(case["vocab"], case["seq"], case["batch"]) for case in result["cases"]] == [(211, 16, 2), (211, 24, 2)]
    for case in result["cases"]:
        names = [*PROMISED, *(name for name in bilevel.TIME_FIGURES if "compiled" not in name), *bilevel.PEAK_FIGURES]
        figures = [case[name] for name in names]
        assert all(isinstance(value, float) and 0 < value < float("inf") for value in figures)
        assert case["relative_error"] < 1e-4 and case["relative_error_fp64"] < 1e-4
        assert case["peak_vs_gradient"] == pytest.approx((1000 + len("step")) / (1000 + len("gradient")))


def test_table_has_numerator_and_denominator_and_is_written(fixed_peaks, capsys, tmp_path: Path) -> None:
    path = tmp_path / "new" / "bilevel.md"
    assert benchmark.main(["bilevel", *TINY, *SIZES, "--output", str(path)]) == 0
    page = path.read_text()
    assert page in capsys.readouterr().out
    assert "vocabulary 211, batch 2 x 24 tokens" in page and f"torch {torch.__version__}" in page
    assert all(table.LABELS[name] in page for name in bilevel.DEFAULT_CASES)
    row = next(line for line in page.splitlines() if line.startswith("| upper_step_speedup"))
    assert "| published_step " in row and "| step " in row


def test_default_case_is_the_reference_case() -> None:
    options = benchmark.parse_arguments(["bilevel"])
    found = options.preset, options.vocab, options.seq, options.batch, options.cases
    assert found == ("pythia-31m", [50304], [1024], [4], bilevel.DEFAULT_CASES)


def test_a_case_that_dies_for_want_of_memory_leaves_its_figures_empty(monkeypatch, capsys) -> None:
    peak = lambda name, *_: None if name == "published_step" else Peak(10, 20)  # noqa: E731
    monkeypatch.setattr(bilevel, "_peak_in_child", peak)
    arguments = [*TINY, *SIZES, "--cases", "gradient", "published_step", "step", "--json"]
    assert benchmark.main(["bilevel", *arguments]) == 0
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert case["upper_step_speedup"] is None and case["peak_vs_published"] is None
    assert case["peak_vs_gradient"] == 1.0 and set(case["times"]) == {"gradient", "step"}


@needs_linux
def test_memory_limits_are_held_against_measured_peaks(capsys) -> None:
    sizes = ["--presets", "pythia-14m", "--vocab", "2048", "--seq", "64", "--batch", "4", "--limits", "0.01", "0.5"]
    assert benchmark.main(["memory", *sizes, "--json"]) == 0
    small, large = json.loads(capsys.readouterr().out)["points"]
    assert "expected at least 0." in small["refused"]
    assert 0 < large["measured_bytes"] <= large["estimated_bytes"] <= 2**29


def test_wrong_sizes_are_an_error_that_says_what_to_change(capsys) -> None:
    assert benchmark.main(["bilevel", "--seq", "1"]) == 1
    assert "found --seq 1 --batch 4, expected at least 2 tokens" in capsys.readouterr().err


def first_freed_then_second() -> Peak:
    keep = torch.ones(1 << 24)

    def case() -> None:
        first = torch.ones(12 << 20)
        del first
        second = torch.ones(20 << 20)
        assert second[0] == keep[0]

    return measure.measure_peak(case, torch.device("cpu"))


@needs_linux
def test_peak_is_what_is_alive_above_what_was_held() -> None:
    """In a process of its own: a run that was made in this one keeps what it frees."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        peak = pool.submit(first_freed_then_second).result()
    assert 79 * 2**20 < peak.peak < 96 * 2**20
    assert peak.held >= 64 * 2**20


@needs_linux
def test_a_case_measured_in_its_own_process_holds_its_logits() -> None:
    sizes = ["--vocab", "5003", "--seq", "128", "--batch", "2"]
    arguments = [sys.executable, benchmark.__file__, "bilevel", *TINY, *sizes, "--peak-of", "gradient"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    found = Peak(**json.loads(done.stdout))
    logits = 2 * 127 * 5003 * 4
    assert 2 * logits <= found.peak < 8 * logits and found.held > 2**20
