"""Whether the files of a corpus, subset or validation set are whole and belong together."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from megatron_bliss.data.indexed import IndexedCorpus, blocks
from megatron_bliss.data.manifest import corpus_digest, read_manifest
from megatron_bliss.data.provenance import open_provenance
from megatron_bliss.data.subset import root_prefix, root_units
from megatron_bliss.data.validation import ValidationCorpus

TOKEN_BLOCK = 1 << 21


def verify_corpus(prefix: str | os.PathLike, *, caches: list[str] | None = None) -> dict:
    """Hold everything that is known of a corpus against its files; ValueError at the first thing that is wrong.

    In this order: header, counts against file sizes, lengths and pointers within ``.bin``, manifest, SHA-256 of the
    index, counts, SHA-256 of ``.bin`` and every id below the vocabulary's size (one reading), a subset's units against
    its root, a validation set's labels, provenance, and caches of megatron-core made before the index (beside the
    corpus, and in ``caches``). Returns what it found: units, tokens, contiguous, largest_id, kind, caches.
    Memory: a few megabytes beside what the system maps of the index.
    """
    corpus, manifest = IndexedCorpus(prefix), read_manifest(prefix)
    corpus_digest(prefix, thorough=True)
    counts = {"units": len(corpus), "tokens": corpus.num_tokens}
    for name, found in counts.items():
        if manifest["counts"][name] != found:
            raise ValueError(
                f"{prefix}.idx has {found} {name}, expected {manifest['counts'][name]} from its manifest: make it again"
            )
    largest = _check_tokens(corpus, manifest)
    if manifest["kind"] == "subset":
        _check_subset(corpus, manifest)
    if manifest["kind"] == "validation":
        ValidationCorpus(prefix)
    _check_provenance(prefix, len(corpus))
    return {
        **counts,
        "kind": manifest["kind"],
        "dtype": corpus.dtype.name,
        "contiguous": is_contiguous(corpus),
        "largest_id": largest,
        "caches": check_caches(corpus, caches or []),
    }


def is_contiguous(corpus: IndexedCorpus) -> bool:
    """Whether every unit begins where the one before it ends, as slices and merges of other tools assume."""
    end = 0
    for part in blocks(len(corpus)):
        starts = corpus.pointers[part].copy()
        stops = starts + corpus.lengths[part] * np.int64(corpus.dtype.itemsize)
        if starts[0] != end or (starts[1:] != stops[:-1]).any():
            return False
        end = int(stops[-1])
    return True


def check_caches(corpus: IndexedCorpus, folders: list[str]) -> int:
    """Number of megatron-core's dataset caches of this corpus; ValueError for one that is not of this index.

    Its key is the corpus's path and not its content: a cache that is older than the index, or names units that the
    index does not have, makes a training run read other units than those in the index.
    """
    made, found = os.stat(corpus.index_path).st_mtime_ns, 0
    for folder in [f"{corpus.prefix}/cache/GPTDataset_indices", str(Path(corpus.prefix).parent / "cache"), *folders]:
        for description in glob.glob(os.path.join(glob.escape(folder), "**", "*-description.txt"), recursive=True):
            if not _is_about(description, corpus.prefix):
                continue
            found += 1
            documents = description.removesuffix("description.txt") + "document_index.npy"
            stale = os.stat(description).st_mtime_ns < made
            if not stale and os.path.exists(documents):
                order = np.load(documents, mmap_mode="r", allow_pickle=False)
                stale = len(order) > 0 and int(order.max()) >= len(corpus.document_indices) - 1
            if stale:
                raise ValueError(
                    f"{description} is a dataset cache of megatron-core for an earlier index of this name: a run would "
                    f"train on the wrong units; remove {os.path.dirname(description)}"
                )
    return found


def _is_about(description: str, prefix: str) -> bool:
    try:
        path = json.loads(Path(description).read_text(encoding="utf-8")).get("dataset_path")
    except (ValueError, AttributeError):  # not a description: a file of other software with such a name
        return False
    return isinstance(path, str) and os.path.abspath(path) == os.path.abspath(prefix)


def _check_tokens(corpus: IndexedCorpus, manifest: dict) -> int:
    """Hash ``.bin`` and look at every id in one reading; returns the largest id."""
    digest, largest = hashlib.sha256(), -1
    vocab_size = (manifest.get("tokenizer") or {}).get("vocab_size", np.iinfo(corpus.dtype).max + 1)
    with open(corpus.bin_path, "rb", buffering=0) as stream:
        while block := stream.read(TOKEN_BLOCK):
            digest.update(block)
            tokens = np.frombuffer(block, corpus.dtype)
            largest = max(largest, int(tokens.max()))
            if tokens.min() < 0 or largest >= vocab_size:
                raise ValueError(
                    f"{corpus.bin_path} holds ids from {tokens.min()} to {largest}, but the vocabulary ends at "
                    f"{vocab_size - 1}: it was made with another tokenizer"
                )
    if digest.hexdigest() != manifest["bin_sha256"]:
        raise ValueError(
            f"{corpus.bin_path} has digest {digest.hexdigest()[:12]}, expected {manifest['bin_sha256'][:12]} from its "
            "manifest: it is damaged or was replaced; make it again"
        )
    return largest


def _check_provenance(prefix: str | os.PathLike, units: int) -> None:
    """A corpus's own provenance has one row per unit."""
    path = f"{prefix}.provenance.parquet"
    if os.path.exists(path):
        with open_provenance(path) as file:
            rows = file.metadata.num_rows
        if rows != units:
            raise ValueError(
                f"{path} has {rows} rows, expected {units}, one per unit: it is of another corpus; remove it"
            )


def _check_subset(corpus: IndexedCorpus, manifest: dict) -> None:
    """A subset's unit numbers, and the units of its root that they name."""
    prefix = corpus.prefix
    root, units = IndexedCorpus(root_prefix(prefix)), root_units(prefix)
    if read_manifest(root.prefix)["digest"] != manifest["root"]["digest"]:
        raise ValueError(
            f"{root.prefix} is not the corpus that {prefix} was cut from: it was made again; so must this be"
        )
    shares_tokens = manifest["bin_sha256"] == read_manifest(root.prefix)["bin_sha256"]  # a compact subset has its own
    if shares_tokens and not os.path.samefile(root.bin_path, corpus.bin_path):
        raise ValueError(f"{corpus.bin_path} is not {root.bin_path}, which it should link to: make the subset again")
    for part in blocks(len(units)):
        ids = units[part]
        fits = ids.min() >= 0 and ids.max() < len(root) and (root.lengths[ids] == corpus.lengths[part]).all()
        if not fits or (shares_tokens and (root.pointers[ids] != corpus.pointers[part]).any()):
            raise ValueError(f"{prefix}.units.npy does not fit {prefix}.idx: make the subset again")
