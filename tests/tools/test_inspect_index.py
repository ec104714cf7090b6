"""tools/inspect_index.py: what it shows is what the files hold, and what is wrong with them has a name."""

import json
import re
from pathlib import Path

import pytest

from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.manifest import read_manifest
from megatron_bliss.data.subset import write_subset
from tests.data.corpora import documents, write_corpus, write_lines
from tools import inspect_index


def test_verify_finds_what_is_wrong(scored, tmp_path, capsys):
    prefix, _ = scored
    tokens = bytearray((tmp_path / "X.bin").read_bytes())
    tokens[10] ^= 1
    (tmp_path / "X.bin").write_bytes(tokens)
    assert inspect_index.main(["verify", prefix]) == 1
    assert "X.bin has digest" in capsys.readouterr().err
    (tmp_path / "X.bin").write_bytes(tokens[:-2])
    assert inspect_index.main(["verify", prefix]) == 1
    assert "truncated" in capsys.readouterr().err


def test_a_corpus_of_other_software_is_adopted_once_and_with_its_own_tokenizer(tmp_path, capsys):
    write_corpus(tmp_path / "X", [4, 5, 6], 60_000)
    (tmp_path / "X.manifest.json").unlink()
    prefix = str(tmp_path / "X")
    assert inspect_index.main(["verify", prefix]) == 1 and "inspect_index.py adopt" in capsys.readouterr().err
    assert inspect_index.main(["adopt", prefix]) == 0
    assert inspect_index.main(["verify", prefix]) == 0
    assert read_manifest(prefix)["counts"] == {"units": 3, "tokens": 15} and len(IndexedCorpus(prefix)) == 3
    assert inspect_index.main(["adopt", prefix]) == 1 and "exists already" in capsys.readouterr().err
    (tmp_path / "X.manifest.json").unlink()
    assert inspect_index.main(["adopt", prefix, "--tokenizer-type", "bytes"]) == 1
    assert "the vocabulary ends at 256" in capsys.readouterr().err
    assert not (tmp_path / "X.manifest.json").exists()


def test_the_difference_of_two_subsets_is_counted_and_shown_by_domain(scored, capsys):
    prefix, _ = scored
    first = write_subset(prefix, [0, 1, 2, 3, 4, 5], f"{prefix}.run", label="first")
    second = write_subset(prefix, [1, 4, 7, 10], f"{prefix}.run", label="second")
    assert inspect_index.main(["diff", first, second, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["first"], found["second"], found["shared"], found["jaccard"]) == (6, 4, 2, 0.25)
    assert found["shift"] == pytest.approx(2 / 3) and found["shares"]["letter"] == pytest.approx([1 / 3, 1])
    assert found["shared_tokens"] == sum(IndexedCorpus(first).lengths[[1, 4]])
    assert inspect_index.main(["diff", first, second]) == 0
    output = capsys.readouterr().out
    assert re.search(r"letter +33.3% +100.0% +\+66.7%", output) and re.search(r"only in first +4", output)
    assert inspect_index.main(["diff", first, second, "--field", "format"]) == 0
    assert "shift" not in capsys.readouterr().out
    assert inspect_index.main(["diff", first]) == 1 and "two prefixes" in capsys.readouterr().err
    other = write_lines(Path(f"{prefix}.other.jsonl"), documents(3))
    preprocess(PreprocessSettings(inputs=[other], output_prefix=f"{prefix}other", tokenizer_type="bytes"))
    assert inspect_index.main(["diff", first, f"{prefix}other"]) == 1
    assert "not subsets of the same corpus" in capsys.readouterr().err


def test_show_and_sample_say_what_the_files_hold(scored, capsys):
    prefix, _ = scored
    subset = write_subset(prefix, [1, 4], f"{prefix}.run", label="two")
    assert inspect_index.main(["show", subset]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^units +2$", output, re.M) and re.search(r"^contiguous +no$", output, re.M)
    assert re.search(r"^link to +\.\./X\.bin$", output, re.M) and '"eod": 256' in output
    assert inspect_index.main(["show", subset, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["counts"]["units"] == 2
    assert inspect_index.main(["sample", subset, "--json", "--max-tokens", "2000"]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert [entry["text"] for entry in samples] == [documents(30)[unit]["text"] for unit in (1, 4)]
    assert [entry["source"]["line"] for entry in samples] == [2, 5]
    assert inspect_index.main(["sample", subset, "--count", "1", "--max-tokens", "3"]) == 0
    assert re.search(
        r"^--- unit \d, \d+ tokens  file=.* line=\d+ .*domain=letter\n.{3}$", capsys.readouterr().out, re.M
    )
    assert inspect_index.main(["verify", subset, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["contiguous"] is False
