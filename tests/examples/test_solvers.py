"""The study of solvers: every arm runs, its numbers are what they say they are, wrong input is explained."""

from pathlib import Path

import numpy as np
import pytest

from examples.studies import solvers
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.validation import ValidationSettings, prepare_validation
from tests.data.corpora import documents, write_lines

TINY = ["--warmup-iters", "3", "--upper-iters", "2", "--batch-size", "4", "--seq-length", "12", "--domain", "letter"]
TINY += ["--num-layers", "1", "--hidden-size", "16", "--num-attention-heads", "2", "--sample-units", "50"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pool and validation set of documents in three domains."""
    folder = tmp_path_factory.mktemp("data")
    source = write_lines(folder / "pool.jsonl", documents(60))
    preprocess(PreprocessSettings(inputs=[source], output_prefix=str(folder / "pool"), tokenizer_type="bytes"))
    source = write_lines(folder / "validation.jsonl", [r for r in documents(60, 1) if r["domain"] == "letter"])
    prefix = str(folder / "validation")
    prepare_validation(ValidationSettings(inputs=[source], output_prefix=prefix, tokenizer_type="bytes", label="all"))
    return folder


def test_every_arm_runs_and_the_table_is_written(folder: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "solvers.md"
    arguments = ["--data-folder", str(folder), *TINY, "--seeds", "1,2", "--output", str(path)]
    assert solvers.main(arguments) == 0
    page = path.read_text()
    assert page in capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| ")]
    runs = [[cell.strip() for cell in row] for row in rows if len(row) == 8 and row[1].strip().isdigit()]
    assert sorted((row[0], row[1]) for row in runs) == sorted((arm, seed) for arm in solvers.ARMS for seed in "12")
    for row in runs:
        selected, pool = (float(cell.rstrip("%")) for cell in row[2:4])
        assert 0 <= float(row[5]) <= 1 and float(row[6]) >= 0 and row[7] == ""
        assert float(row[4]) == pytest.approx(selected / pool, abs=0.01)


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    generator = np.random.default_rng(0)
    scores, wanted = generator.integers(0, 6, 40).astype(np.float32), generator.random(40) < 0.4
    pairs = scores[wanted][:, None] - scores[~wanted][None, :]
    assert solvers.auc(scores, wanted) == pytest.approx((pairs > 0).mean() + 0.5 * (pairs == 0).mean())


def test_a_diverged_arm_is_reported(folder: Path, monkeypatch, capsys) -> None:
    class Diverging:
        def __init__(self, *_) -> None:
            pass

        def step(self) -> None:
            raise FloatingPointError("found gradient norm nan")

    monkeypatch.setattr(solvers, "BilevelTrainer", Diverging)
    arguments = ["--data-folder", str(folder), *TINY, "--seeds", "1", "--arms", "identity"]
    assert solvers.main(arguments) == 0
    assert "stopped at step 1: found gradient norm nan" in capsys.readouterr().out


def test_an_absent_domain_is_an_error_that_names_those_there(folder: Path, capsys) -> None:
    assert solvers.main(["--data-folder", str(folder), *TINY, "--domain", "prose"]) == 1
    assert "found domains letter, river, winter, expected prose" in capsys.readouterr().err
