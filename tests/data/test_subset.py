import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.manifest import check_same_tokenizer, corpus_digest, read_manifest
from megatron_bliss.data.provenance import read_provenance
from megatron_bliss.data.subset import root_prefix, root_units, write_subset
from megatron_bliss.data.verify import verify_corpus
from tests.data.corpora import write_corpus


def test_a_subset_of_a_subset_holds_exactly_the_chosen_units(tmp_path):
    write_corpus(tmp_path / "X", list(np.random.default_rng(1).integers(1, 20, 100)))
    corpus = IndexedCorpus(tmp_path / "X")
    chosen = np.sort(np.random.default_rng(2).choice(100, 50, replace=False))
    shard = write_subset(tmp_path / "X", chosen[::-1], tmp_path / "run/shards", label="shard1")
    policy = {"name": "top_fraction", "fraction": 0.2}
    kept = np.array([3, 10, 11, 49])
    selection = write_subset(shard, kept, tmp_path / "run/select", label="top20", policy=policy, extra={"round": 1})
    np.testing.assert_array_equal(root_units(shard), chosen)
    np.testing.assert_array_equal(root_units(selection), chosen[kept])
    for reader in (IndexedCorpus(selection), IndexedDataset(selection)):
        assert len(reader) == 4
        for number, unit in enumerate(chosen[kept]):
            np.testing.assert_array_equal(reader[number], corpus[unit])
    assert os.path.realpath(f"{selection}.bin") == os.path.realpath(corpus.bin_path)
    assert not os.path.isabs(os.readlink(f"{selection}.bin"))
    assert root_prefix(selection) == str(tmp_path / "X")
    manifest = read_manifest(selection)
    assert manifest["policy"] == policy and manifest["round"] == 1 and manifest["counts"]["units"] == 4
    assert manifest["parent"]["digest"] == corpus_digest(shard) and manifest["root"]["digest"] == corpus_digest(
        corpus.prefix
    )
    np.testing.assert_array_equal(IndexedCorpus(selection).document_indices, np.arange(5))


def test_a_corpus_and_its_subsets_can_move_together(tmp_path):
    write_corpus(tmp_path / "a/X", [3, 4, 5])
    prefix = write_subset(tmp_path / "a/X", [0, 2], tmp_path / "a/run", label="top")
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = prefix.replace("/a/", "/b/")
    np.testing.assert_array_equal(IndexedCorpus(moved)[1], IndexedCorpus(tmp_path / "b/X")[2])
    assert root_prefix(moved) == str(tmp_path / "b/X")


def test_names_of_subsets_say_what_is_inside(tmp_path):
    write_corpus(tmp_path / "X", [2, 2, 2, 2])
    first = write_subset(tmp_path / "X", [0, 1], tmp_path, label="top")
    written = os.stat(f"{first}.idx").st_mtime_ns
    assert write_subset(tmp_path / "X", [1, 0], tmp_path, label="top") == first
    assert os.stat(f"{first}.idx").st_mtime_ns == written
    others = [
        write_subset(tmp_path / "X", [0, 2], tmp_path, label="top"),
        write_subset(tmp_path / "X", [0, 1], tmp_path, label="low"),
        write_subset(tmp_path / "X", [0, 1], tmp_path, label="top", policy={"seed": 2}),
    ]
    assert len({first, *others}) == 4
    assert first.startswith(str(tmp_path / "X.top-")) and len(first.rpartition("-")[2]) == 8
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name or name.startswith(".")]


def test_equal_lengths_do_not_make_equal_corpora(tmp_path):
    write_corpus(tmp_path / "A", [4, 4], seed=1)
    write_corpus(tmp_path / "B", [4, 4], seed=2)
    assert (tmp_path / "A.idx").read_bytes() == (tmp_path / "B.idx").read_bytes()
    assert corpus_digest(tmp_path / "A") != corpus_digest(tmp_path / "B")


@pytest.mark.parametrize(
    "ids, message",
    [([], "no unit"), ([0, 4], "expected 0 to 3"), ([-1], "expected 0 to 3"), ([1, 2, 1], "unit 1 .* twice")],
)
def test_unit_numbers_that_are_not_there_or_repeat_are_refused(tmp_path, ids, message):
    write_corpus(tmp_path / "X", [2, 2, 2, 2])
    with pytest.raises(ValueError, match=message):
        write_subset(tmp_path / "X", ids, tmp_path, label="top")


def test_an_index_rewritten_under_its_old_name_is_noticed(tmp_path):
    write_corpus(tmp_path / "X", [2, 2, 2, 2])
    write_corpus(tmp_path / "Y", [2, 2, 4])
    shutil.copy(tmp_path / "Y.idx", tmp_path / "X.idx")
    with pytest.raises(ValueError, match="rewritten under an old name"):
        write_subset(tmp_path / "X", [0], tmp_path, label="top")


def test_replaced_tokens_are_noticed(tmp_path):
    write_corpus(tmp_path / "X", [2, 2, 2, 2])
    with open(tmp_path / "X.bin", "ab") as stream:
        stream.write(b"\0\0")
    with pytest.raises(ValueError, match="expected 16 from its manifest"):
        corpus_digest(tmp_path / "X")


def test_corpora_without_manifest_or_provenance_say_so(tmp_path):
    write_corpus(tmp_path / "X", [2, 2])
    with pytest.raises(ValueError, match="only corpora made by tools/preprocess_data.py"):
        read_provenance(tmp_path / "X")
    os.unlink(tmp_path / "X.manifest.json")
    with pytest.raises(ValueError, match="inspect_index.py adopt"):
        read_manifest(tmp_path / "X")


def test_corpora_of_two_tokenizers_are_told_apart(tmp_path):
    write_corpus(tmp_path / "A", [2, 2], 1000)
    write_corpus(tmp_path / "B", [2], 1000)
    write_corpus(tmp_path / "C", [2], 1001)
    check_same_tokenizer(tmp_path / "A", tmp_path / "B")
    with pytest.raises(ValueError, match="1000 ids, EOD 0.*1001 ids"):
        check_same_tokenizer(tmp_path / "A", tmp_path / "C")


def test_manifests_without_a_quick_digest_still_hold(tmp_path):
    write_corpus(tmp_path / "X", [2, 2, 2, 2])
    path = tmp_path / "X.manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("index_crc32") == zlib.crc32((tmp_path / "X.idx").read_bytes())
    path.write_text(json.dumps(manifest))
    subset = write_subset(tmp_path / "X", [1, 2], tmp_path, label="top")
    assert read_manifest(subset)["index_sha256"] == hashlib.sha256(Path(f"{subset}.idx").read_bytes()).hexdigest()
    data = bytearray((tmp_path / "X.idx").read_bytes())
    data[34] ^= 2
    (tmp_path / "X.idx").write_bytes(data)
    with pytest.raises(ValueError, match="rewritten under an old name"):
        write_subset(tmp_path / "X", [0], tmp_path, label="top")


def test_large_indexes_are_read_in_blocks(tmp_path, monkeypatch):
    lengths = list(np.random.default_rng(0).integers(0, 5, 500))
    write_corpus(tmp_path / "X", lengths)
    ids = np.flatnonzero(np.random.default_rng(1).random(500) < 0.3)
    at_once = write_subset(tmp_path / "X", ids, tmp_path / "a", label="top")
    monkeypatch.setattr("megatron_bliss.data.indexed.BLOCK", 7)
    monkeypatch.setattr("megatron_bliss.data.indexed.blocks.__defaults__", (7,))
    in_blocks = write_subset(tmp_path / "X", ids, tmp_path / "b", label="top")
    for suffix in (".idx", ".units.npy"):
        assert Path(at_once + suffix).read_bytes() == Path(in_blocks + suffix).read_bytes()
    verify_corpus(in_blocks)
