"""tools/subset_index.py: scores become the subset that the policy says."""

import json
import os
import re
import shutil

import numpy as np

from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.manifest import corpus_digest, read_manifest
from megatron_bliss.data.provenance import read_provenance
from megatron_bliss.data.subset import root_units, write_subset
from megatron_bliss.selection.combine import mean_rank, mean_score, rank_product
from tests.data.corpora import SENTENCES, documents, write_corpus, write_lines
from tools import inspect_index, subset_index


def make_subset(prefix, scores, *more):
    """Run the command."""
    return subset_index.main(["--input-prefix", prefix, "--scores", scores, "--output-folder", f"{prefix}.run", *more])


def test_the_highest_scores_become_a_subset(scored, capsys):
    prefix, scores = scored
    assert make_subset(prefix, scores, "--fraction", "0.3333") == 0
    output = capsys.readouterr().out
    subset = output.partition(":")[0]
    np.testing.assert_array_equal(root_units(subset), np.arange(1, 30, 3))
    assert "letter" in output and "100.0%" in output
    manifest = read_manifest(subset)
    assert manifest["policy"] == {"name": "top_fraction", "fraction": 0.3333, "seed": 0, "threshold": 1.0}
    assert manifest["scores"][0]["file"] == "scores.npy" and len(manifest["scores"][0]["sha256"]) == 64
    assert make_subset(prefix, scores, "--policy", "threshold", "--threshold", "0.5") == 0
    np.testing.assert_array_equal(root_units(capsys.readouterr().out.partition(":")[0]), np.arange(1, 30, 3))
    for command in ("verify", "show", "sample"):
        assert inspect_index.main([command, subset]) == 0
    assert "contiguous  no" in capsys.readouterr().out


def kept_units(prefix, scores, capsys, *more):
    """Root units of the subset that the command makes, and its manifest."""
    assert make_subset(prefix, scores, *more) == 0
    subset = capsys.readouterr().out.partition(":")[0]
    return root_units(subset), read_manifest(subset)


def test_every_policy_keeps_what_it_says(scored, capsys):
    prefix, scores = scored
    for options, letters, count in (
        (["--policy", "proportional", "--fraction", "0.5"], 5, 15),
        (["--policy", "quotas", "--fraction", "0.5", "--quotas", "letter=0.2", "river=0.6"], 3, 15),
        (["--policy", "gumbel", "--fraction", "0.3", "--temperature", "0.01"], 9, 9),
        (["--policy", "floors", "--fraction", "0.5", "--floors", "river=0.4", "winter=0.2"], 6, 15),
        (["--policy", "mixed", "--fraction", "0.3", "--random-share", "0"], 9, 9),
    ):
        ids, manifest = kept_units(prefix, scores, capsys, *options)
        assert len(ids) == count and (ids % 3 == 1).sum() == letters and manifest["policy"]["name"] == options[1]
    assert make_subset(prefix, scores, "--policy", "gumbel", "--fraction", "0.3", "--temperature", "1e-3") == 0
    assert "temperature 0.001: the effective sample size is 33.33% of the units" in capsys.readouterr().out
    ids, manifest = kept_units(prefix, scores, capsys, "--policy", "token_budget", "--tokens", "600")
    assert manifest["counts"]["tokens"] <= 600 and set(ids % 3) == {1}
    for options, message in (
        (["--policy", "gumbel", "--fraction", "0.3", "--temperature", "0"], "selection.temperature"),
        (["--policy", "token_budget"], "needs --tokens"),
        (["--policy", "quotas", "--fraction", "0.5", "--quotas", "letter"], "NAME=SHARE"),
        (["--policy", "proportional", "--fraction", "0.5", "--domain-field", "label"], "no unit of .* has a label"),
        (["--policy", "threshold", "--threshold", "2"], "keeps no unit .* from 0 to 1"),
    ):
        assert make_subset(prefix, scores, *options) == 1
        assert re.search(message, capsys.readouterr().err)


def test_of_near_duplicates_the_best_is_kept(tmp_path, capsys):
    texts = [sentence * 3 for sentence in SENTENCES]
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in [*texts, *texts, "x" + texts[0]]])
    prefix, scores = str(tmp_path / "X"), str(tmp_path / "scores.npy")
    preprocess(PreprocessSettings(inputs=[source], output_prefix=prefix, tokenizer_type="bytes"))
    np.save(scores, np.arange(11, dtype=np.float32))
    (tmp_path / "scores.json").write_text(json.dumps({"corpus_digest": corpus_digest(prefix)}))
    assert make_subset(prefix, scores, "--fraction", "0.4", "--near-duplicates", "0.8", "--combine", "union") == 0
    output = capsys.readouterr().out
    subset = output.partition(":")[0]
    np.testing.assert_array_equal(root_units(subset), [7, 8, 9, 10])
    assert "left out: 6 near-duplicates of units with a better score" in output
    (policy,) = read_manifest(subset)["policy"]["parts"]
    assert policy["near_duplicates"] == 0.8 and policy["fraction"] == 0.4
    assert make_subset(prefix, scores, "--fraction", "0.4", "--max-similarity", "0.8", "--combine", "union") == 0
    assert capsys.readouterr().out == output
    assert make_subset(prefix, scores, "--fraction", "0.4", "--near-duplicates", "1.5") == 1
    assert "found selection.near_duplicates 1.5, expected 0 to 1" in capsys.readouterr().err


def test_score_files_are_combined_and_excluded_units_left_out(scored, tmp_path, capsys):
    prefix, first = scored
    second = str(tmp_path / "other.npy")
    np.save(second, (np.arange(30) >= 20).astype(np.float32))
    shutil.copy(tmp_path / "scores.json", tmp_path / "other.json")
    both = ["--scores", first, second, "--fraction", "0.33333"]  # the second --scores wins
    ids, manifest = kept_units(prefix, first, capsys, *both, "--combine", "union")
    np.testing.assert_array_equal(ids, sorted({*range(1, 30, 3), *range(20, 30)}))
    assert len(manifest["scores"]) == 2 and manifest["policy"]["combine"] == "union"
    ids, _ = kept_units(prefix, first, capsys, *both, "--combine", "intersection")
    np.testing.assert_array_equal(ids, [22, 25, 28])
    ids, _ = kept_units(prefix, first, capsys, *both, "--combine", "mean", "--weights", "0.1", "0.9")
    np.testing.assert_array_equal(ids, range(20, 30))
    for way, expected in (("ranks", [20]), ("product", [20]), ("minimum", [20])):
        scores = [np.eye(30)[20] + np.eye(30)[3] * 0.9, np.arange(30) - 30 * np.eye(30)[3]]
        for path, one in zip((first, second), scores, strict=True):
            np.save(path, one.astype(np.float32))
        ids, manifest = kept_units(prefix, first, capsys, *both[:-1], "0.03", "--combine", way)
        np.testing.assert_array_equal(ids, expected)
        assert manifest["policy"]["combine"] == way and "weights" not in manifest["policy"]
    weights = ["--combine", "ranks", "--weights", "1", "0"]
    ids, manifest = kept_units(prefix, first, capsys, *both[:-1], "0.067", *weights)
    assert ids.tolist() == [3, 20] and manifest["policy"]["weights"] == [1, 0]
    np.save(first, (np.arange(30) % 3 == 1).astype(np.float32))
    (tmp_path / "seen.txt").write_text("1\n4\n")
    subset = write_subset(prefix, [25, 28], tmp_path, label="seen")
    ids, manifest = kept_units(
        prefix,
        first,
        capsys,
        "--policy",
        "threshold",
        "--threshold",
        "1",
        "--exclude",
        str(tmp_path / "seen.txt"),
        subset,
    )
    np.testing.assert_array_equal(ids, [7, 10, 13, 16, 19, 22])
    assert manifest["policy"]["excluded"] == 4
    assert make_subset(prefix, first, *both) == 1 and "expected --combine" in capsys.readouterr().err
    (tmp_path / "seen.txt").write_text("1\nword\n")
    assert make_subset(prefix, first, "--fraction", "0.1", "--exclude", str(tmp_path / "seen.txt")) == 1
    assert "no list of unit numbers" in capsys.readouterr().err


def rows_of(path):
    """Rows of an exported file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_chosen_units_are_written_as_text(scored, tmp_path, capsys):
    prefix, scores = scored
    np.save(scores, np.arange(30, dtype=np.float32))
    for more, words in (([], "text of the source files"), (["--export-text", "tokens"], "text decoded from tokens")):
        path = tmp_path / "out.jsonl"
        assert make_subset(prefix, scores, "--fraction", "0.1", "--export", str(path), *more) == 0
        output = capsys.readouterr().out
        assert f"{path}: 3 rows, {words}" in output.splitlines()[-1]
        rows = rows_of(path)
        assert [row["text"] for row in rows] == [documents(30)[unit]["text"] for unit in (27, 28, 29)]
        assert [(row["score"], row["rank"], row["id"]) for row in rows] == [
            (unit, 30 - unit, f"a.jsonl:{unit + 1}") for unit in (27, 28, 29)
        ]
    assert make_subset(prefix, scores, "--fraction", "0.1", "--export", str(path), "--export-text", "none") == 0
    assert "no text" in capsys.readouterr().out and "text" not in rows_of(path)[0]


def test_combined_scores_are_exported(scored, tmp_path, capsys):
    prefix, first = scored
    second = str(tmp_path / "other.npy")
    np.save(second, np.arange(30, dtype=np.float32))
    shutil.copy(tmp_path / "scores.json", tmp_path / "other.json")
    parts = [np.load(first), np.load(second)]
    for way, expected in (("union", mean_score(parts)), ("ranks", mean_rank(parts)), ("product", rank_product(parts))):
        options = ["--fraction", "0.2", "--combine", way, "--export", str(tmp_path / "out.jsonl")]
        assert make_subset(prefix, first, "--scores", first, second, *options) == 0
        rows = rows_of(tmp_path / "out.jsonl")
        np.testing.assert_allclose([row["score"] for row in rows], [expected[row["unit"]] for row in rows], rtol=1e-6)
        assert min(rows, key=lambda row: row["rank"])["score"] == max(row["score"] for row in rows)


def test_what_cannot_be_exported_is_told_before_anything_is_written(scored, tmp_path, capsys):
    prefix, scores = scored
    for options, message in (
        (["--export", "out.csv"], "found out.csv, expected a name with one of .jsonl"),
        (["--export", str(tmp_path / "a.jsonl")], "which the rows come from"),
    ):
        assert make_subset(prefix, scores, "--fraction", "0.1", *options) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_text("changed")
    options = ["--export", str(tmp_path / "o.jsonl"), "--export-text", "source"]
    assert make_subset(prefix, scores, "--fraction", "0.1", *options) == 1
    assert "with 7 bytes" in capsys.readouterr().err and not os.path.exists(f"{prefix}.run")


def test_a_compact_subset_holds_its_own_tokens_in_order(scored, tmp_path, capsys):
    prefix, scores = scored
    ids, manifest = kept_units(prefix, scores, capsys, "--fraction", "0.33333", "--compact")
    subset = next(str(path)[:-4] for path in tmp_path.glob("X.run/*.bin"))
    small, whole = IndexedCorpus(subset), IndexedCorpus(prefix)
    np.testing.assert_array_equal(small.tokens, np.concatenate([whole[int(unit)] for unit in ids]))
    assert not os.path.islink(small.bin_path) and manifest["bin_bytes"] == small.bin_bytes < whole.bin_bytes
    assert set(read_provenance(subset).column("domain").to_pylist()) == {"letter"}
    again = write_subset(subset, [0, 2], tmp_path / "deep", label="again")  # a subset of a compact subset
    np.testing.assert_array_equal(IndexedCorpus(again)[1], whole[int(ids[2])])
    for made in (subset, again):
        assert inspect_index.main(["verify", made]) == 0


def test_scores_of_another_corpus_are_refused(scored, tmp_path, capsys):
    prefix, scores = scored
    write_corpus(tmp_path / "Y", [3] * 30)
    assert make_subset(str(tmp_path / "Y"), scores, "--fraction", "0.1") == 1
    assert "scores.json is for a corpus with digest" in capsys.readouterr().err
    np.save(scores, np.zeros(29))
    assert make_subset(prefix, scores, "--fraction", "0.1") == 1
    assert "has shape [29]" in capsys.readouterr().err
    np.save(scores, np.full(30, np.nan))
    assert make_subset(prefix, scores, "--fraction", "0.1") == 1
    assert "30 of 30 scores are not finite" in capsys.readouterr().err
    assert make_subset(prefix, scores) == 1
