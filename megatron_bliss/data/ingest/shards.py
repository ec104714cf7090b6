"""A corpus made in shards, one per node of an array: which files are whose, and the shards put together again."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_bliss.data.indexed import IndexedCorpus, blocks
from megatron_bliss.data.ingest.assembly import CorpusAssembler
from megatron_bliss.data.ingest.provenance import ROW_GROUP, SCHEMA
from megatron_bliss.data.ingest.windows import WindowCutter
from megatron_bliss.data.ingest.work_folder import WorkFolder
from megatron_bliss.data.manifest import corpus_digest, manifest_path, read_manifest, write_manifest

SAME = ("kind", "unit", "window_length", "tokenizer", "settings", "dtype")


def parse_shard(text: str) -> tuple[int, int]:
    """``i/n`` as two numbers: an argument's type."""
    try:
        shard, shards = map(int, text.split("/"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected i/n such as 3/16") from error
    return shard, shards


def shard_prefix(prefix: str, shard: int, shards: int) -> str:
    """Prefix of one shard, counted from 1."""
    return f"{prefix}.shard_{shard:04d}_of_{shards:04d}"


def deal(files: Sequence[str], shard: int, shards: int) -> list[str]:
    """The files of one shard, counted from 1: neighbours, about equal in bytes, at least one file each.

    Shards follow each other as the files do, so that joined they are what one run makes. Raises ValueError when there
    are more shards than files.
    """
    if shards > len(files):
        raise ValueError(f"{shards} shards of {len(files)} files, expected at most one per file: change --shard")
    ends = np.cumsum([os.path.getsize(file) for file in files])
    bounds = [0]
    for number in range(1, shards):
        wanted = int(np.searchsorted(ends, ends[-1] * number / shards, side="left")) + 1
        bounds.append(min(max(wanted, bounds[-1] + 1), len(files) - (shards - number)))
    bounds.append(len(files))
    return list(files[bounds[shard - 1] : bounds[shard]])


def merge_shards(prefix: str, shards: int) -> dict:
    """Join the finished shards of ``prefix`` into one corpus, byte for byte what one run would have made.

    Returns its manifest. A finished one is left as it is. Raises ValueError when a shard is missing or differs in its
    settings, or when something else has that name.
    """
    prefixes = [shard_prefix(prefix, shard, shards) for shard in range(1, shards + 1)]
    manifests = [_shard_manifest(name, [shard, shards]) for shard, name in enumerate(prefixes, 1)]
    shared = _check_same(prefixes, manifests)
    sources = [source for manifest in manifests for source in manifest["sources"]]
    work = WorkFolder(prefix)
    finished = _finished(prefix, shared, sources, work)
    if finished:
        return finished
    counts = {name: sum(manifest["counts"][name] for manifest in manifests) for name in ("documents", "rejected")}
    with work.open({"merge": shards, "shards": [manifest["digest"] for manifest in manifests]}, []):
        cutter = WindowCutter(shared["window_length"]) if shared["unit"] == "window" else None
        provenance = shared["settings"].get("provenance", True)
        dtype = np.dtype(shared["dtype"])
        assembler = CorpusAssembler(work.path, dtype, cutter, provenance=provenance, keep_documents=False)
        for name in prefixes:
            _append(assembler, name, shared, provenance)
        record = assembler.finish(counts)
        assembler.publish(prefix)
        identity = {key: shared[key] for key in SAME if key != "dtype"}
        manifest = write_manifest(prefix, {**identity, **record, "sources": sources})
        work.remove()
    return manifest


def _shard_manifest(prefix: str, shard: list[int]) -> dict:
    if not os.path.isfile(manifest_path(prefix)):
        raise ValueError(f"{manifest_path(prefix)} does not exist: finish shard {shard[0]}/{shard[1]} first")
    corpus_digest(prefix)
    manifest = read_manifest(prefix)
    if manifest.get("shard") != shard:
        raise ValueError(f"{manifest_path(prefix)} is shard {manifest.get('shard')}, expected {shard}: make it again")
    return manifest


def _check_same(prefixes: list[str], manifests: list[dict]) -> dict:
    """What all shards share."""
    shared = [_without_tokenizer_file({key: manifest.get(key) for key in SAME}) for manifest in manifests]
    for name, found in zip(prefixes, shared, strict=True):
        different = [key for key in SAME if found[key] != shared[0][key]]
        if different:
            raise ValueError(f"{name} has another {' and '.join(different)} than {prefixes[0]}: make it again")
    files = [source["file"] for manifest in manifests for source in manifest["sources"]]
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise ValueError(f"{twice} is in two shards: they were made from different inputs; make them again")
    return {key: manifests[0].get(key) for key in SAME}


def _without_tokenizer_file(shared: dict) -> dict:
    return {**shared, "tokenizer": {**shared["tokenizer"], "file": None}}


def _finished(prefix: str, shared: dict, sources: list[dict], work: WorkFolder) -> dict | None:
    if not os.path.exists(manifest_path(prefix)):
        taken = [f"{prefix}{suffix}" for suffix in (".bin", ".idx") if os.path.exists(f"{prefix}{suffix}")]
        if taken and not work.exists():
            raise ValueError(f"{taken[0]} exists without a manifest: remove it or change --output-prefix")
        return None
    manifest = read_manifest(prefix)
    if any(manifest.get(key) != shared[key] for key in SAME) or manifest.get("sources") != sources:
        raise ValueError(f"{manifest_path(prefix)} is of another corpus: remove it or change --output-prefix")
    work.remove()
    return manifest


def _append(assembler: CorpusAssembler, prefix: str, shared: dict, provenance: bool) -> None:
    """Append one shard."""
    size = os.path.getsize(f"{prefix}.bin")
    assembler.add_tokens(f"{prefix}.bin", size)
    is_windows = shared["unit"] == "window"
    tokens = 0
    for lengths, rows in (_documents if is_windows else _units)(prefix, provenance):
        assembler.add_documents(lengths, rows)
        tokens += int(lengths.sum())
    if is_windows and tokens * assembler.dtype.itemsize > size:  # the last token was in no window of the shard
        assembler.add_token(shared["tokenizer"]["eod"])
    with open(f"{prefix}.rejected.jsonl", "rb") as rejected:
        assembler.copy_rejects(rejected)


def _units(prefix: str, provenance: bool) -> Iterator[tuple[np.ndarray, pa.Table | None]]:
    corpus = IndexedCorpus(prefix)
    rows = pq.ParquetFile(f"{prefix}.provenance.parquet").iter_batches(ROW_GROUP) if provenance else None
    for part in blocks(len(corpus), ROW_GROUP):
        batch = rows and pa.Table.from_batches([next(rows)])
        yield corpus.lengths[part].astype(np.int64), batch


def _documents(prefix: str, provenance: bool) -> Iterator[tuple[np.ndarray, pa.Table | None]]:
    for batch in pq.ParquetFile(f"{prefix}.documents.parquet").iter_batches(ROW_GROUP):
        table = pa.Table.from_batches([batch])
        yield table.column("length").to_numpy(), table.select(SCHEMA.names) if provenance else None
