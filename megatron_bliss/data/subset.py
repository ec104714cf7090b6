"""Subsets: an index rewritten over the same tokens. Nothing is copied; ``.bin`` is a relative link.

A subset ``Y`` of ``X`` has ``Y.idx`` (the chosen units in corpus order, at their original byte pointers, each a
document of its own), ``Y.bin`` (link), ``Y.units.npy`` (int64, for every unit of Y its number in the *root* corpus:
the one that is nobody's subset) and ``Y.manifest.json``. The name carries a digest of the content, because
megatron-core's dataset cache does not look inside an index: one rewritten under an old name silently trains on the
wrong tokens.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_bliss.base.files import DigestWriter, atomic_file, sha256_text, sync_folder
from megatron_bliss.data.copying import UnitCopier
from megatron_bliss.data.indexed import (
    IndexedCorpus,
    blocks,
    chosen,
    contiguous_pointers,
    in_blocks,
    write_index_blocks,
)
from megatron_bliss.data.manifest import content_digest, corpus_digest, manifest_path, read_manifest, write_manifest


def write_subset(
    parent_prefix: str | os.PathLike,
    ids: np.ndarray,
    folder: str | os.PathLike,
    *,
    label: str,
    policy: dict | None = None,
    extra: dict | None = None,
    compact: bool = False,
) -> str:
    """Write units ``ids`` of a corpus or subset as a new index in ``folder``; returns its prefix.

    ids: int[n], unit numbers of the parent, in any order, each once. label: a short word for the name (``top20``).
    policy: how they were chosen (name, fraction, threshold, seed ...). extra: more keys for the manifest.
    compact: copy the chosen tokens, in order, to a ``.bin`` of the subset's own instead of linking to the parent's.
    The same call again finds its own result and changes nothing. Raises ValueError for ids that are repeated or none.
    Reads the parent's index front to back in blocks; memory: the ids and mapped pages of the index.
    """
    parent, parent_digest = IndexedCorpus(parent_prefix), corpus_digest(parent_prefix)
    parent_manifest = read_manifest(parent_prefix)
    ids = _increasing_ids(ids, len(parent), parent.prefix)
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".subset-", dir=folder) as staging:
        index, tokens = Path(staging) / "idx", Path(staging) / "bin"
        held = {key: parent_manifest[key] for key in ("bin_bytes", "bin_sha256")}
        if compact:
            with atomic_file(tokens) as stream:
                held = UnitCopier(stream).copy(parent, ids).record()
        written = _write_chosen_index(index, parent, ids, compact)
        digest = content_digest(written["index_sha256"], held["bin_sha256"])
        name = sha256_text(parent_digest, digest, label, json.dumps(policy, sort_keys=True))[:8]
        prefix = str(Path(folder) / f"{Path(parent.prefix).name}.{label}-{name}")
        if os.path.exists(manifest_path(prefix)) and corpus_digest(prefix) == digest:
            return prefix
        _write_units(f"{prefix}.units.npy", parent_prefix, ids)
        if compact:
            os.replace(tokens, f"{prefix}.bin")
        else:
            _link(parent.bin_path, f"{prefix}.bin")
        os.replace(index, f"{prefix}.idx")
    sync_folder(folder)
    manifest = {
        "kind": "subset",
        **{key: parent_manifest.get(key) for key in ("unit", "window_length", "tokenizer", "dtype")},
        "counts": {
            "units": len(ids),
            "tokens": sum(int(part.sum(dtype=np.int64)) for part in chosen(parent.lengths, ids)),
        },
        **written,
        **held,
        "label": label,
        "policy": policy,
        "parent": reference(parent_prefix, folder),
        "root": reference(root_prefix(parent_prefix), folder),
        **(extra or {}),
    }
    write_manifest(prefix, manifest)
    return prefix


def _write_chosen_index(path: Path, parent: IndexedCorpus, ids: np.ndarray, compact: bool) -> dict:
    """Write the index of ``ids`` over the parent's tokens, or over tokens that follow each other; its digests."""
    lengths, pointers = chosen(parent.lengths, ids), chosen(parent.pointers, ids)
    if compact:
        pointers = contiguous_pointers(chosen(parent.lengths, ids), parent.dtype.itemsize)
    with atomic_file(path) as stream:
        digests = DigestWriter(stream)
        write_index_blocks(digests, parent.dtype, len(ids), lengths, pointers)
    return {"index_sha256": digests.sha256, "index_crc32": digests.crc32}


def _write_units(path: str, parent_prefix: str | os.PathLike, ids: np.ndarray) -> None:
    """Write ``Y.units.npy``: the numbers in the root corpus of the parent's units ``ids``."""
    is_root = read_manifest(parent_prefix)["kind"] != "subset"
    parts: Iterable[np.ndarray] = in_blocks(ids) if is_root else chosen(root_units(parent_prefix), ids)
    with atomic_file(path) as stream:
        header = {"descr": "<i8", "fortran_order": False, "shape": (len(ids),)}
        np.lib.format.write_array_header_1_0(stream, header)
        for part in parts:
            stream.write(np.ascontiguousarray(part, dtype="<i8"))


def root_prefix(prefix: str | os.PathLike) -> str:
    """The corpus that a subset (of a subset ...) was cut from; a corpus is its own root."""
    manifest = read_manifest(prefix)
    if manifest["kind"] != "subset":
        return str(prefix)
    return os.path.normpath(Path(os.path.realpath(Path(prefix).parent)) / manifest["root"]["prefix"])


def root_units(prefix: str | os.PathLike, ids: np.ndarray | None = None) -> np.ndarray:
    """For every unit of a corpus or subset (ids: for these) its number in the root corpus: int64[n], increasing."""
    manifest = read_manifest(prefix)
    units = manifest["counts"]["units"]
    if manifest["kind"] != "subset":
        return np.arange(units, dtype=np.int64) if ids is None else np.array(ids, dtype=np.int64)
    found = _units_file(prefix, units)
    return found if ids is None else found[np.asarray(ids, dtype=np.int64)]


def _units_file(prefix: str | os.PathLike, units: int) -> np.ndarray:
    """``Y.units.npy``, mapped."""
    path = f"{prefix}.units.npy"
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist, so it is not known which units these are: make the subset again")
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a usable .npy file ({error}): make the subset again") from error
    if ids.dtype != np.int64 or ids.shape != (units,):
        raise ValueError(f"{path} holds {ids.dtype}{list(ids.shape)}, expected int64[{units}]: make the subset again")
    return ids


def root_digest(prefix: str | os.PathLike) -> str:
    """The digest of the root corpus, as the manifest has it."""
    manifest = read_manifest(prefix)
    return manifest["root"]["digest"] if manifest["kind"] == "subset" else manifest["digest"]


def units_within(other: str | os.PathLike, prefix: str | os.PathLike) -> np.ndarray:
    """Numbers in ``prefix`` of the units that another subset of the same root corpus also holds (int64, increasing)."""
    if root_digest(other) != root_digest(prefix):
        raise ValueError(f"{other} and {prefix} are not subsets of the same corpus: their units cannot be compared")
    theirs, ours = root_units(other), root_units(prefix)
    places = np.searchsorted(ours, theirs)
    places = np.minimum(places, len(ours) - 1)
    return places[ours[places] == theirs]


def _increasing_ids(ids: np.ndarray, count: int, prefix: str) -> np.ndarray:
    ids = np.asarray(ids, dtype=np.int64).reshape(-1)
    if not _rises(ids):
        ids = np.sort(ids)
    if not len(ids):
        raise ValueError(f"no unit of {prefix} was chosen, expected at least one: choose a larger fraction")
    if ids[0] < 0 or ids[-1] >= count:
        raise ValueError(f"units {ids[0]} to {ids[-1]} of {prefix}, expected 0 to {count - 1}")
    if not _rises(ids):
        repeated = ids[:-1][np.diff(ids) == 0][0]
        raise ValueError(f"unit {repeated} of {prefix} was chosen twice, expected each at most once")
    return ids


def _rises(ids: np.ndarray) -> bool:
    """Whether every id is larger than the one before it."""
    return all(
        (ids[part.start + 1 : part.stop + 1] > ids[part][: len(ids) - part.start - 1]).all()
        for part in blocks(len(ids))
    )


def _link(target: str, path: str) -> None:
    relative = os.path.relpath(os.path.realpath(target), os.path.realpath(Path(path).parent))
    temporary = f"{path}.{os.getpid()}.tmp"
    os.symlink(relative, temporary)
    os.replace(temporary, path)


def reference(prefix: str | os.PathLike, folder: str | os.PathLike) -> dict:
    """How a manifest in ``folder`` names another corpus: prefix relative to the folder, units, digest."""
    real, manifest = Path(os.path.realpath(Path(prefix).parent)) / Path(prefix).name, read_manifest(prefix)
    relative = os.path.relpath(real, os.path.realpath(folder))
    return {"prefix": relative, "units": manifest["counts"]["units"], "digest": manifest["digest"]}
