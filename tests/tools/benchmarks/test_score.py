"""tools/benchmark.py score: the figures it promises."""

import json

from tools import benchmark
from tools.benchmarks.score import c4_lengths

SMALL = [
    "--units",
    "4",
    "--window",
    "32",
    "--batch-tokens",
    "64",
    "--repetitions",
    "1",
    "--ngram-tokens",
    "3000",
    "--scale-units",
    "20000",
]
PROMISED = (
    "tokens_per_second",
    "throughput_vs_huggingface",
    "padding_waste",
    "ngram_tokens_per_cpu_second",
    "raw_megabytes_per_cpu_second",
    "scale_peak_bytes",
)


def test_json_has_the_promised_figures(capsys) -> None:
    assert benchmark.main(["score", *SMALL, "--megabytes", "0.3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["machine"]["device"] == "cpu" and all(result[name] > 0 for name in PROMISED if "padding" not in name)
    assert 0 <= result["padding_waste"] <= result["huggingface_padding_waste"] < 1


def test_lengths_are_those_of_c4() -> None:
    lengths = c4_lengths(100_000)
    assert abs(lengths.mean() - 488) < 10 and abs(sorted(lengths)[50_000] - 280) < 5
