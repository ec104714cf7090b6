import os

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.manifest import adopt_manifest, read_manifest
from megatron_bliss.data.merge import merge_corpora
from megatron_bliss.data.provenance import read_provenance
from megatron_bliss.data.subset import root_prefix, root_units, write_subset
from megatron_bliss.data.verify import verify_corpus
from tests.data.corpora import documents, write_corpus, write_lines
from tools import merge_index


def units_of(prefix):
    """Tokens of every unit, by this package's reader, which must agree with megatron-core's."""
    ours, theirs = IndexedCorpus(prefix), IndexedDataset(str(prefix))
    assert len(ours) == len(theirs)
    for number in range(len(ours)):
        np.testing.assert_array_equal(ours[number], theirs[number])
    return [ours[number].tolist() for number in range(len(ours))]


def random_corpus(prefix, count, seed, **options):
    write_corpus(prefix, list(np.random.default_rng(seed).integers(1, 20, count)), seed=seed, **options)
    return str(prefix)


@pytest.mark.parametrize("piece", [1 << 22, 16])
def test_corpora_and_subsets_merge_one_after_the_other(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("megatron_bliss.data.copying.PIECE_BYTES", piece)  # 16: the kernel copies most of it
    first, second = random_corpus(tmp_path / "A", 40, 1), random_corpus(tmp_path / "B", 30, 2)
    subset = write_subset(second, [3, 4, 5, 11, 29], tmp_path / "run", label="top")
    merged = merge_corpora([first, subset], tmp_path / "out")
    assert units_of(merged) == units_of(first) + units_of(subset)
    assert verify_corpus(merged)["contiguous"] and not os.path.islink(f"{merged}.bin")
    manifest = read_manifest(merged)
    assert manifest["kind"] == "corpus" and [parent["units"] for parent in manifest["parents"]] == [40, 5]
    written = os.stat(f"{merged}.idx").st_mtime_ns
    assert (
        merge_corpora([first, subset], tmp_path / "out") == merged and os.stat(f"{merged}.idx").st_mtime_ns == written
    )
    assert merge_corpora([subset, first], tmp_path / "out") != merged
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".") or "tmp" in name]


def test_subsets_of_one_corpus_merge_without_a_copy(tmp_path):
    corpus = random_corpus(tmp_path / "A", 60, 1)
    first = write_subset(corpus, np.arange(40, 60, 3), tmp_path / "run", label="late")
    second = write_subset(
        write_subset(corpus, np.arange(30), tmp_path / "run", label="shard"), [2, 9], tmp_path, label="top"
    )
    merged = merge_corpora([first, second], tmp_path / "out")
    np.testing.assert_array_equal(root_units(merged), [2, 9, *range(40, 60, 3)])
    assert os.path.realpath(f"{merged}.bin") == os.path.realpath(f"{corpus}.bin") and root_prefix(merged) == corpus
    everything = units_of(corpus)
    assert units_of(merged) == [everything[unit] for unit in root_units(merged)]
    verify_corpus(merged)
    overlapping = write_subset(corpus, [0, 9, 43], tmp_path / "run", label="more")
    with pytest.raises(ValueError, match=r"2 units of .*\(the first: unit 1\) .* --drop-repeated"):
        merge_corpora([first, second, overlapping], tmp_path / "out")
    merged = merge_corpora([first, second, overlapping], tmp_path / "out", drop_repeated=True)
    np.testing.assert_array_equal(root_units(merged), [0, 2, 9, *range(40, 60, 3)])


def test_repeated_units_are_dropped_from_a_copy_too(tmp_path):
    first, second = random_corpus(tmp_path / "A", 10, 1), random_corpus(tmp_path / "B", 4, 2)
    subset = write_subset(first, [2, 7], tmp_path, label="top")
    merged = merge_corpora([subset, second, first], tmp_path / "out", drop_repeated=True)
    everything = units_of(first)
    assert units_of(merged) == [
        everything[2],
        everything[7],
        *units_of(second),
        *(everything[u] for u in (0, 1, 3, 4, 5, 6, 8, 9)),
    ]


def test_documents_of_several_units_stay_documents(tmp_path):
    for name, lengths in (("A", [[2, 3], [4]]), ("B", [[1], [2, 2, 2]])):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=DType.optimal_dtype(1000))
        for document in lengths:
            builder.add_document(torch.arange(sum(document)), document)
        builder.finalize(str(tmp_path / f"{name}.idx"))
        adopt_manifest(tmp_path / name, None)
    merged = merge_corpora([tmp_path / "A", tmp_path / "B"], tmp_path / "out")
    np.testing.assert_array_equal(IndexedCorpus(merged).document_indices, [0, 2, 3, 4, 7])
    assert units_of(merged) == units_of(tmp_path / "A") + units_of(tmp_path / "B")


def test_provenance_and_sources_are_merged(tmp_path):
    prefixes = []
    for name, count in (("A", 6), ("B", 5)):
        source = write_lines(tmp_path / f"{name}.jsonl", documents(count))
        prefixes.append(str(tmp_path / name))
        preprocess(PreprocessSettings(inputs=[source], output_prefix=prefixes[-1], tokenizer_type="bytes"))
    subset = write_subset(prefixes[1], [1, 4], tmp_path / "run", label="top")
    merged = merge_corpora([prefixes[0], subset], tmp_path / "out", label="both")
    rows = read_provenance(merged).to_pylist()
    assert rows == read_provenance(prefixes[0]).to_pylist() + read_provenance(subset).to_pylist()
    assert [os.path.basename(entry["file"]) for entry in read_manifest(merged)["sources"]] == ["A.jsonl", "B.jsonl"]
    assert os.path.basename(merged).startswith("both-")
    plain = random_corpus(tmp_path / "C", 3, 1, vocab_size=257)
    for prefix in (prefixes[0], plain):  # the same tokenizer for both
        os.unlink(f"{prefix}.manifest.json")
        adopt_manifest(prefix, None)
    rows = read_provenance(merge_corpora([plain, prefixes[0]], tmp_path / "out")).to_pylist()
    assert [(row["file"], row["line"], row["url"]) for row in rows[:3]] == [("C", unit, None) for unit in range(3)]
    assert rows[3]["domain"] == "river" and len(rows) == 9


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(tmp_path, capsys):
    first, other_ids = random_corpus(tmp_path / "A", 5, 1), random_corpus(tmp_path / "B", 5, 2, vocab_size=50_000)
    wide = random_corpus(tmp_path / "C", 5, 3, vocab_size=70_000)
    unknown = random_corpus(tmp_path / "D", 5, 4)
    os.unlink(f"{unknown}.manifest.json")
    adopt_manifest(unknown, None)
    windows = random_corpus(tmp_path / "E", 5, 5)
    tokenizer = read_manifest(windows)["tokenizer"]
    os.unlink(f"{windows}.manifest.json")
    adopt_manifest(windows, tokenizer, unit="window")
    for prefixes, message in (
        ([first], "at least two"),
        ([first, other_ids], "50000 ids, EOD 0"),
        ([first, wide], "was tokenised with"),
        ([first, unknown], "D does not say which tokenizer"),
        ([first, windows], "has unit window, but"),
        ([first, first], "--drop-repeated"),
    ):
        assert merge_index.main(["--input-prefixes", *prefixes, "--output-folder", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    second = random_corpus(tmp_path / "F", 5, 6)
    assert merge_index.main(["--input-prefixes", first, second, "--output-folder", str(tmp_path / "out")]) == 0
    assert "10 units" in capsys.readouterr().out
