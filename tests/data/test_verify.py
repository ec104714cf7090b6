"""Everything that can be wrong with the files of a corpus, a subset or a validation set, each with its clear error.

Headers, counts, lengths, pointers and truncation of ``.idx`` and ``.bin`` alone are in test_indexed.py.
"""

import json
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.manifest import corpus_digest
from megatron_bliss.data.subset import write_subset
from megatron_bliss.data.validation import ValidationSettings, prepare_validation
from megatron_bliss.data.verify import verify_corpus
from tests.data.corpora import PASSAGES, documents, write_lines
from tools import inspect_index, subset_index


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A corpus with a scored subset and a validation set, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_lines(folder / "a.jsonl", documents(30))
    preprocess(PreprocessSettings(inputs=[source], output_prefix=str(folder / "X"), tokenizer_type="bytes"))
    subset = write_subset(folder / "X", np.arange(0, 30, 2), folder, label="even")
    source = write_lines(folder / "v.jsonl", [{"text": text} for text in PASSAGES])
    settings = ValidationSettings(inputs=[source], output_prefix=str(folder / "V"), tokenizer_type="bytes")
    prepare_validation(settings)
    np.save(folder / "scores.npy", np.arange(30, dtype=np.float32))
    (folder / "scores.json").write_text(json.dumps({"corpus_digest": corpus_digest(folder / "X")}))
    return folder, os.path.basename(subset)


@pytest.fixture
def files(whole, tmp_path):
    """Paths of a fresh copy: ``corpus``, ``subset``, ``validation`` are prefixes in ``folder``."""
    folder = tmp_path / "data"
    shutil.copytree(whole[0], folder, symlinks=True)
    return SimpleNamespace(
        folder=folder, corpus=str(folder / "X"), subset=str(folder / whole[1]), validation=str(folder / "V")
    )


def patch(path, offset, content):
    """Overwrite bytes in place."""
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def cut(path, keep):
    """Cut a file's end off."""
    os.truncate(path, os.path.getsize(path) + keep if keep < 0 else keep)


def edit(prefix, **changes):
    """Change keys of a manifest; None takes one out."""
    path = f"{prefix}.manifest.json"
    with open(path) as stream:
        manifest = json.load(stream)
    manifest = {key: value for key, value in {**manifest, **changes}.items() if value is not None}
    with open(path, "w") as stream:
        json.dump(manifest, stream)


def relink(path, target):
    """Let a link point elsewhere."""
    os.unlink(path)
    os.symlink(target, path)


def replace_array(path, change):
    """Save a changed copy of an array."""
    array = change(np.load(path))
    np.save(path, array, allow_pickle=array.dtype == object)


def add(path, content):
    """Append bytes."""
    with open(path, "ab") as stream:
        stream.write(content)


DAMAGE = {
    "no manifest": (lambda f: os.unlink(f"{f.corpus}.manifest.json"), "corpus", "manifest.json does not exist; finish"),
    "half a manifest": (lambda f: cut(f"{f.corpus}.manifest.json", 50), "corpus", "is not valid JSON"),
    "a list for a manifest": (
        lambda f: (f.folder / "X.manifest.json").write_text("[]"),
        "corpus",
        "holds a list, expected a JSON object",
    ),
    "a manifest without digests": (
        lambda f: edit(f.corpus, bin_sha256=None),
        "corpus",
        "has no bin_sha256; it is damaged",
    ),
    "a later format": (lambda f: edit(f.corpus, format_version=99), "corpus", "format version 99, expected 1"),
    "counts that are none": (lambda f: edit(f.corpus, counts=[30]), "corpus", r"counts \[30\] .* whole numbers"),
    "negative counts": (lambda f: edit(f.corpus, counts={"units": -1, "tokens": 1}), "corpus", "whole numbers"),
    "an unknown kind": (lambda f: edit(f.corpus, kind="shelf"), "corpus", "kind 'shelf'"),
    "a subset without a root": (lambda f: edit(f.subset, root=None), "subset", "has no root"),
    "another number of units": (
        lambda f: edit(f.corpus, counts={"units": 29, "tokens": 1}),
        "corpus",
        "30 units, expected 29 from its manifest",
    ),
    "an index changed in place": (
        lambda f: patch(f"{f.corpus}.idx", 34, b"\1\0\0\0"),
        "corpus",
        "rewritten under an old name",
    ),
    "an index with more at its end": (
        lambda f: add(f"{f.corpus}.idx", b"x"),
        "corpus",
        "bytes, but 30 sequences and 31 document entries take",
    ),
    "an index cut off": (lambda f: cut(f"{f.corpus}.idx", -8), "corpus", "not a usable index"),
    "an empty index": (lambda f: cut(f"{f.corpus}.idx", 0), "corpus", "0 bytes, expected at least the header's 34"),
    "a folder for an index": (
        lambda f: (os.unlink(f"{f.corpus}.idx"), os.mkdir(f"{f.corpus}.idx")),
        "corpus",
        "X.idx does not exist",
    ),
    "tokens cut off": (lambda f: cut(f"{f.corpus}.bin", -2), "corpus", "the file is truncated or of another index"),
    "half a token": (lambda f: cut(f"{f.corpus}.bin", -1), "corpus", "expected a multiple of 2"),
    "tokens with more at their end": (
        lambda f: add(f"{f.corpus}.bin", b"\0\0"),
        "corpus",
        "from its manifest: it is truncated or was replaced",
    ),
    "one changed token": (lambda f: patch(f"{f.corpus}.bin", 20, b"z"), "corpus", "X.bin has digest"),
    "an id outside the vocabulary": (
        lambda f: patch(f"{f.corpus}.bin", 20, b"\xff\xff"),
        "corpus",
        "ids from .* to 65535, but the vocabulary ends at 256",
    ),
    "provenance of other units": (
        lambda f: (os.unlink(f"{f.corpus}.provenance.parquet"), another_provenance(f)),
        "corpus",
        "has 7 rows, expected 30, one per unit",
    ),
    "damaged provenance": (
        lambda f: cut(f"{f.corpus}.provenance.parquet", -20),
        "corpus",
        "is not a usable provenance file",
    ),
    "no unit numbers": (lambda f: os.unlink(f"{f.subset}.units.npy"), "subset", "units.npy does not exist"),
    "unit numbers cut off": (
        lambda f: cut(f"{f.subset}.units.npy", -8),
        "subset",
        "units.npy is not a usable .npy file",
    ),
    "unit numbers of another type": (
        lambda f: replace_array(f"{f.subset}.units.npy", lambda a: a.astype(np.int32)),
        "subset",
        r"holds int32\[15\], expected int64\[15\]",
    ),
    "unit numbers that are pickled": (
        lambda f: replace_array(f"{f.subset}.units.npy", lambda a: a.astype(object)),
        "subset",
        "is not a usable .npy file",
    ),
    "other unit numbers": (
        lambda f: replace_array(f"{f.subset}.units.npy", lambda a: a + 1),
        "subset",
        "units.npy does not fit",
    ),
    "unit numbers beyond the corpus": (
        lambda f: replace_array(f"{f.subset}.units.npy", lambda a: a + 1000),
        "subset",
        "units.npy does not fit",
    ),
    "a link to nothing": (
        lambda f: relink(f"{f.subset}.bin", "away.bin"),
        "subset",
        "link to away.bin, which is not there",
    ),
    "a link to other tokens": (
        lambda f: (shutil.copy(f"{f.corpus}.bin", f.folder / "Y.bin"), relink(f"{f.subset}.bin", "Y.bin")),
        "subset",
        "which it should link to",
    ),
    "a corpus made again": (
        lambda f: edit(f.corpus, digest="0" * 64),
        "subset",
        "X is not the corpus that .* was cut from",
    ),
    "a corpus that is gone": (
        lambda f: [os.unlink(f"{f.corpus}{suffix}") for suffix in (".idx", ".manifest.json")],
        "subset",
        "X.idx does not exist",
    ),
    "no labels": (lambda f: os.unlink(f"{f.validation}.labels.npy"), "validation", "labels.npy does not exist"),
    "labels of another set": (
        lambda f: replace_array(f"{f.validation}.labels.npy", lambda a: a[:-3]),
        "validation",
        "expected uint8",
    ),
}


def another_provenance(f):
    """Seven rows of another corpus."""
    source = write_lines(f.folder / "b.jsonl", documents(7))
    preprocess(PreprocessSettings(inputs=[source], output_prefix=str(f.folder / "B"), tokenizer_type="bytes"))
    shutil.copy(f.folder / "B.provenance.parquet", f"{f.corpus}.provenance.parquet")


@pytest.mark.parametrize("damage, which, message", DAMAGE.values(), ids=DAMAGE)
def test_verify_says_what_is_wrong(files, capsys, damage, which, message):
    prefix = getattr(files, which)
    assert inspect_index.main(["verify", prefix]) == 0
    damage(files)
    capsys.readouterr()
    assert inspect_index.main(["verify", prefix]) == 1
    error = capsys.readouterr().err
    assert error.startswith("inspect_index: ") and re.search(message, error) and "Traceback" not in error


SCORES = {
    "no record": (lambda f: os.unlink(f.folder / "scores.json"), "scores.json"),
    "half a record": (lambda f: cut(f.folder / "scores.json", 5), "is not valid JSON"),
    "scores cut off": (lambda f: cut(f.folder / "scores.npy", -4), "expected a .npy file of numbers"),
    "empty scores": (lambda f: cut(f.folder / "scores.npy", 0), "expected a .npy file of numbers"),
    "pickled scores": (
        lambda f: replace_array(f.folder / "scores.npy", lambda a: a.astype(object)),
        "expected a .npy file of numbers",
    ),
    "scores of fewer units": (lambda f: replace_array(f.folder / "scores.npy", lambda a: a[1:]), r"has shape \[29\]"),
    "a score that is no number": (
        lambda f: replace_array(f.folder / "scores.npy", lambda a: np.where(a == 3, np.nan, a)),
        r"1 of 30 scores are not finite \(unit 3",
    ),
    "scores of another corpus": (
        lambda f: (f.folder / "scores.json").write_text('{"corpus_digest": "abc"}'),
        "is for a corpus with digest abc",
    ),
}


@pytest.mark.parametrize("damage, message", SCORES.values(), ids=SCORES)
def test_damaged_scores_select_nothing(files, capsys, damage, message):
    damage(files)
    options = ["--input-prefix", files.corpus, "--scores", str(files.folder / "scores.npy"), "--fraction", "0.5"]
    assert subset_index.main([*options, "--output-folder", str(files.folder / "out")]) == 1
    assert re.search(message, capsys.readouterr().err) and not (files.folder / "out").exists()


@pytest.mark.parametrize("place", ["X/cache/GPTDataset_indices", "cache", "elsewhere"])
def test_a_cache_of_an_earlier_index_is_found(files, place):
    folder = files.folder / place
    folder.mkdir(parents=True)
    description = folder / "abc-GPTDataset-train-description.txt"
    description.write_text(json.dumps({"class": "GPTDataset", "dataset_path": files.corpus}))
    np.save(folder / "abc-GPTDataset-train-document_index.npy", np.arange(30, dtype=np.int32))
    (folder / "other-description.txt").write_text("not JSON")
    elsewhere = [str(files.folder / "elsewhere")]
    assert verify_corpus(files.corpus, caches=elsewhere)["caches"] == 1
    np.save(folder / "abc-GPTDataset-train-document_index.npy", np.arange(31, dtype=np.int32))
    with pytest.raises(ValueError, match="dataset cache of megatron-core for an earlier index"):
        verify_corpus(files.corpus, caches=elsewhere)
    np.save(folder / "abc-GPTDataset-train-document_index.npy", np.arange(30, dtype=np.int32))
    os.utime(description, ns=(0, os.stat(f"{files.corpus}.idx").st_mtime_ns - 1))
    with pytest.raises(ValueError, match="would train on the wrong units; remove"):
        verify_corpus(files.corpus, caches=elsewhere)
