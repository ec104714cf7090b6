"""Subsets: an index rewritten over the same tokens. Nothing is copied; ``.bin`` is a relative link.

A subset ``Y`` of ``X`` has ``Y.idx`` (the chosen units in corpus order, at their original byte pointers, each a
document of its own), ``Y.bin`` (link), ``Y.units.npy`` (int64, for every unit of Y its number in the *root* corpus:
the one that is nobody's subset) and ``Y.manifest.json``. The name carries a digest of the content, because
megatron-core's dataset cache does not look inside an index: one rewritten under an old name silently trains on the
wrong tokens.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_bliss.data.indexed import IndexedCorpus, write_index
from megatron_bliss.data.manifest import content_digest, corpus_digest, manifest_path, read_manifest, write_manifest
from megatron_bliss.files import atomic_file, sha256_file, sha256_text, sync_folder


def write_subset(
    parent_prefix: str | os.PathLike,
    ids: np.ndarray,
    folder: str | os.PathLike,
    *,
    label: str,
    policy: dict | None = None,
    extra: dict | None = None,
) -> str:
    """Write units ``ids`` of a corpus or subset as a new index in ``folder``; returns its prefix.

    ids: int[n], unit numbers of the parent, in any order, each once. label: a short word for the name (``top20``).
    policy: how they were chosen (name, fraction, threshold, seed ...). extra: more keys for the manifest.
    The same call again finds its own result and changes nothing. Raises ValueError for ids that are repeated or none.
    """
    parent, parent_digest = IndexedCorpus(parent_prefix), corpus_digest(parent_prefix)
    ids = _sorted_ids(ids, len(parent), parent.prefix)
    Path(folder).mkdir(parents=True, exist_ok=True)
    lengths, pointers = parent.lengths[ids], parent.pointers[ids]
    temporary = Path(folder) / f".subset.{os.getpid()}"
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(temporary.unlink, missing_ok=True)
        with atomic_file(temporary) as stream:
            write_index(stream, parent.dtype, lengths, pointers)
        parent_manifest = read_manifest(parent_prefix)
        index_sha256 = sha256_file(temporary)
        digest = content_digest(index_sha256, parent_manifest["bin_sha256"])
        name = sha256_text(parent_digest, digest, label, json.dumps(policy, sort_keys=True))[:8]
        prefix = str(Path(folder) / f"{Path(parent.prefix).name}.{label}-{name}")
        if os.path.exists(manifest_path(prefix)) and corpus_digest(prefix) == digest:
            return prefix
        _link(parent.bin_path, f"{prefix}.bin")
        with atomic_file(f"{prefix}.units.npy") as stream:
            np.save(stream, root_units(parent_prefix)[ids])
        os.replace(temporary, f"{prefix}.idx")
    sync_folder(folder)
    counts = {"units": len(ids), "tokens": int(lengths.sum(dtype=np.int64))}
    manifest = {
        "kind": "subset",
        **{key: parent_manifest.get(key) for key in ("unit", "window_length", "tokenizer", "dtype")},
        "counts": counts,
        "index_sha256": index_sha256,
        **{key: parent_manifest[key] for key in ("bin_bytes", "bin_sha256")},
        "label": label,
        "policy": policy,
        "parent": _reference(parent_prefix, folder, len(parent), parent_digest),
        "root": _root_reference(parent_prefix, folder),
        **(extra or {}),
    }
    write_manifest(prefix, manifest)
    return prefix


def root_prefix(prefix: str | os.PathLike) -> str:
    """The corpus that a subset (of a subset ...) was cut from; a corpus is its own root."""
    manifest = read_manifest(prefix)
    if manifest["kind"] != "subset":
        return str(prefix)
    return os.path.normpath(Path(os.path.realpath(Path(prefix).parent)) / manifest["root"]["prefix"])


def root_units(prefix: str | os.PathLike) -> np.ndarray:
    """For every unit of a corpus or subset its number in the root corpus: int64[n], increasing."""
    manifest = read_manifest(prefix)
    units = manifest["counts"]["units"]
    if manifest["kind"] != "subset":
        return np.arange(units, dtype=np.int64)
    path = f"{prefix}.units.npy"
    ids = np.load(path, mmap_mode="r", allow_pickle=False)
    if ids.dtype != np.int64 or ids.shape != (units,):
        raise ValueError(f"{path} holds {ids.dtype}{list(ids.shape)}, expected int64[{units}]: make the subset again")
    return ids


def read_provenance(
    prefix: str | os.PathLike, ids: np.ndarray | None = None, columns: list[str] | None = None
) -> pa.Table:
    """Where units come from: one row per unit, in the order of ``ids`` (None: all units of ``prefix``).

    Columns: file, line, and what the source had of url, domain, format, label. Memory: what is asked for, plus one row
    group. Raises ValueError when the root corpus has no provenance file.
    """
    root = root_prefix(prefix)
    path = f"{root}.provenance.parquet"
    if not os.path.isfile(path):
        raise ValueError(
            f"{path} does not exist; only corpora made by tools/preprocess_data.py know where text came from"
        )
    units = root_units(prefix)
    units = np.asarray(units if ids is None else units[np.asarray(ids, dtype=np.int64)])
    order = np.argsort(units, kind="stable")
    wanted, start, parts = units[order], 0, []
    with pq.ParquetFile(path) as file:
        schema = (
            file.schema_arrow if columns is None else pa.schema([file.schema_arrow.field(name) for name in columns])
        )
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            first, last = np.searchsorted(wanted, [start, stop])
            if first < last:
                parts.append(file.read_row_group(group, columns=columns).take(wanted[first:last] - start))
            start = stop
    table = pa.concat_tables([*parts, schema.empty_table()])
    if len(table) != len(units):
        raise ValueError(f"{path} has {start} rows, but unit {wanted[-1]} was asked for: it is of another corpus")
    return table.take(np.argsort(order, kind="stable"))


def _sorted_ids(ids: np.ndarray, count: int, prefix: str) -> np.ndarray:
    ids = np.sort(np.asarray(ids, dtype=np.int64).reshape(-1))
    if not len(ids):
        raise ValueError(f"no unit of {prefix} was chosen, expected at least one: choose a larger fraction")
    if ids[0] < 0 or ids[-1] >= count:
        raise ValueError(f"units {ids[0]} to {ids[-1]} of {prefix}, expected 0 to {count - 1}")
    if (np.diff(ids) == 0).any():
        raise ValueError(
            f"unit {ids[:-1][np.diff(ids) == 0][0]} of {prefix} was chosen twice, expected each at most once"
        )
    return ids


def _link(target: str, path: str) -> None:
    relative = os.path.relpath(os.path.realpath(target), os.path.realpath(Path(path).parent))
    temporary = f"{path}.{os.getpid()}.tmp"
    os.symlink(relative, temporary)
    os.replace(temporary, path)


def _reference(prefix: str | os.PathLike, folder: str | os.PathLike, units: int, digest: str) -> dict:
    real = Path(os.path.realpath(Path(prefix).parent)) / Path(prefix).name
    return {"prefix": os.path.relpath(real, os.path.realpath(folder)), "units": units, "digest": digest}


def _root_reference(prefix: str | os.PathLike, folder: str | os.PathLike) -> dict:
    root = root_prefix(prefix)
    manifest = read_manifest(root)
    return _reference(root, folder, manifest["counts"]["units"], manifest["digest"])
