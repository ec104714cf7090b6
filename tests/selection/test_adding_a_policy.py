"""The policy of docs/extending.md, put into a copy of the package as the page says: one file, one name in a table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.manifest import corpus_digest, read_manifest
from megatron_bliss.data.subset import root_units
from tests.data.corpora import documents, write_lines
from tests.extending import extended_copy, run_in


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The package and its commands with the policy below_top."""
    return extended_copy(tmp_path_factory.mktemp("copy"), "selection/policies", "quotas")


def test_a_subset_is_made_by_it(copy: Path, tmp_path: Path) -> None:
    source, prefix = write_lines(tmp_path / "a.jsonl", documents(30)), str(tmp_path / "X")
    preprocess(PreprocessSettings(inputs=[source], output_prefix=prefix, tokenizer_type="bytes"))
    np.save(tmp_path / "scores.npy", np.arange(30, dtype=np.float32))
    (tmp_path / "scores.json").write_text(json.dumps({"corpus_digest": corpus_digest(prefix)}))
    tool = [str(copy / "tools/subset_index.py"), "--input-prefix", prefix, "--scores", str(tmp_path / "scores.npy")]
    tool += ["--output-folder", str(tmp_path / "run"), "--policy", "below_top", "--skip", "0.1"]
    done = run_in(copy, *tool, "--fraction", "0.2")
    assert done.returncode == 0, done.stderr
    subset = done.stdout.partition(":")[0]
    assert "X.below10top20-" in subset
    np.testing.assert_array_equal(root_units(subset), range(21, 27))
    found = {"name": "below_top", "fraction": 0.2, "skip": 0.1, "seed": 0, "lowest_score_kept": 21.0}
    assert read_manifest(subset)["policy"] == found
    assert "policy below_top needs --fraction" in run_in(copy, *tool).stderr
    text = run_in(copy, *tool[:1], "--help").stdout
    assert "below_top: the best but for the very best" in text
    assert "below_top: share of units with the highest scores that is left out. Default: 0.01" in text


def test_a_run_has_its_options_and_checks(copy: Path) -> None:
    code = """
import sys, yaml
from megatron_bliss.config.parse import dump_yaml
from megatron_bliss.run.options import parse_options
from megatron_bliss.selection.select import check_selection, kept_share
config = parse_options(sys.argv[1:])
check_selection(config.selection)
print(yaml.safe_load(dump_yaml(config))["selection"]["skip"], kept_share(config.selection, 1000, 10))
"""
    options = ["--selection.policy", "below_top", "--selection.skip", "0.25", "--selection.fraction"]
    assert run_in(copy, "-c", code, *options, "0.5").stdout == "0.25 0.5\n"
    wrong = run_in(copy, "-c", code, *options, "0.5", "--selection.skip", "1").stderr
    assert "found selection.skip 1.0, expected 0 or more, less than 1" in wrong
    text = " ".join(run_in(copy, str(copy / "pretrain_bliss.py"), "--help").stdout.split())
    assert "--selection.skip SKIP below_top: share of units with the highest scores that is left out." in text
    assert "top_fraction, soft, gumbel, mixed, proportional, floors, quotas, below_top: share of units kept." in text
    assert "quotas: the best under a given mixture; below_top: the best but for the very best." in text
