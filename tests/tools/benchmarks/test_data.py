"""tools/benchmark.py data: the figures it promises, and that it measures two ways to the same bytes."""

import json
from pathlib import Path

import pytest

from tests.data.corpora import documents, write_lines
from tools import benchmark
from tools.benchmarks import data, index

PROMISED = {
    "machine", "megabytes_per_cpu_second", "speedup_vs_stock", "peak_rss_bytes", "subset_seconds_per_million",
    "verify_seconds_per_million",
}  # fmt: skip


@pytest.fixture
def costs(monkeypatch) -> None:
    """Costs of the index that take no time; how they are measured has its own tests."""
    monkeypatch.setattr(index, "subset_seconds_per_million", lambda units, folder: {"seconds_per_million": 0.01})
    monkeypatch.setattr(index, "verify_seconds_per_million", lambda units, folder: {"seconds_per_million": 0.02})


def test_json_has_the_promised_figures(costs, tmp_path, capsys) -> None:
    source = write_lines(tmp_path / "a.jsonl", documents(400))
    page = tmp_path / "new" / "data.md"
    options = ["--input", source, "--vocab-size", "500", "--repetitions", "1", "--output", str(page), "--json"]
    assert benchmark.main(["data", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) >= PROMISED
    assert result["megabytes"] == pytest.approx(Path(source).stat().st_size / 1e6, abs=1e-3)
    assert result["speedup_vs_stock"] == pytest.approx(
        result["megabytes_per_cpu_second"] / result["stock_megabytes_per_cpu_second"]
    )
    assert 50e6 < result["peak_rss_bytes"] < 1e9
    assert (result["subset_seconds_per_million"], result["verify_seconds_per_million"]) == (0.01, 0.02)
    assert f"| speedup | {result['speedup_vs_stock']:.1f} |" in page.read_text()


def test_corpora_that_differ_are_an_error(costs, tmp_path, monkeypatch, capsys) -> None:
    def write(end: bytes):
        def run(source: str, prefix: str, *_) -> float:
            for suffix in (".bin", ".idx"):
                Path(f"{prefix}{suffix}").write_bytes(b"tokens" + end)
            return 1.0

        return run

    monkeypatch.setattr(data, "_run_ours", lambda *arguments: (write(b"1")(*arguments), 1))
    monkeypatch.setattr(data, "_run_stock", write(b"2"))
    source = write_lines(tmp_path / "a.jsonl", documents(40))
    assert benchmark.main(["data", "--input", source, "--vocab-size", "400"]) == 1
    assert ".bin differs between this package and the stock scheme" in capsys.readouterr().err
