"""Several corpora or subsets as one: an index alone where they share their tokens, else one ``.bin`` after the other.

Pointers are followed unit by unit, so indexes that are not contiguous (subsets) merge right; everything is int64.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_bliss.base.files import DigestWriter, atomic_file, sync_folder
from megatron_bliss.data.copying import UnitCopier
from megatron_bliss.data.indexed import (
    IndexedCorpus,
    blocks,
    chosen,
    contiguous_pointers,
    in_blocks,
    write_index_blocks,
)
from megatron_bliss.data.ingest.provenance import ROW_GROUP, SCHEMA
from megatron_bliss.data.manifest import (
    check_same_tokenizer,
    content_digest,
    corpus_digest,
    manifest_path,
    read_manifest,
    write_manifest,
)
from megatron_bliss.data.provenance import read_provenance
from megatron_bliss.data.subset import reference, root_digest, root_prefix, root_units, write_subset

PROVENANCE_BLOCK = 1 << 20


@dataclass(frozen=True)
class Part:
    """One of the merged corpora; ``ids``: the units of it that are taken (None: all)."""

    prefix: str
    corpus: IndexedCorpus
    ids: np.ndarray | None

    def __len__(self) -> int:
        return len(self.corpus) if self.ids is None else len(self.ids)

    def blocks_of(self, array: np.ndarray) -> Iterator[np.ndarray]:
        """Entries of an array of the corpus that belong to the units taken."""
        return in_blocks(array) if self.ids is None else chosen(array, self.ids)

    def documents(self, first: int) -> Iterator[np.ndarray]:
        """First unit of each document, counted from ``first``; a document of its own for each unit of a part."""
        if self.ids is None:
            return (part.copy() + first for part in in_blocks(self.corpus.document_indices[:-1]))
        return (np.arange(part.start, part.stop, dtype=np.int64) + first for part in blocks(len(self.ids)))

    @property
    def num_documents(self) -> int:
        return len(self.corpus.document_indices) - 1 if self.ids is None else len(self.ids)


def merge_corpora(
    prefixes: Sequence[str | os.PathLike],
    folder: str | os.PathLike,
    *,
    label: str = "merged",
    drop_repeated: bool = False,
) -> str:
    """Merge corpora and subsets into one in ``folder``; returns its prefix, whose name carries a digest of the content.

    Subsets that share one ``.bin`` become a subset of their root, in corpus order: nothing is copied. Otherwise tokens
    are copied once, in the order given, and the result is a corpus of its own with merged provenance.
    drop_repeated: take units that several subsets hold once; otherwise they are refused.
    Raises ValueError where tokenizers, dtypes or units differ.
    """
    if len(prefixes) < 2:
        raise ValueError(f"{len(prefixes)} corpora to merge, expected at least two: change --input-prefixes")
    prefixes = [str(prefix) for prefix in prefixes]
    for prefix in prefixes:
        corpus_digest(prefix)
    check_compatible(prefixes)
    taken = _without_repeats(prefixes, drop_repeated)
    if len({root_digest(prefix) for prefix in prefixes}) == 1 and _share_tokens(prefixes):
        root = root_prefix(prefixes[0])
        units = [np.asarray(root_units(prefix)) for prefix in prefixes]
        units = np.concatenate([whole if ids is None else whole[ids] for whole, ids in zip(units, taken, strict=True)])
        extra = {"parents": [reference(prefix, folder) for prefix in prefixes]}
        return write_subset(root, units, folder, label=label, policy={"name": "merge"}, extra=extra)
    parts = [Part(prefix, IndexedCorpus(prefix), ids) for prefix, ids in zip(prefixes, taken, strict=True)]
    return _write_merged([part for part in parts if len(part)], prefixes, Path(folder), label)


def check_compatible(prefixes: Sequence[str]) -> None:
    """Raise ValueError for corpora that differ in tokenizer, dtype or kind of unit."""
    first, manifest = prefixes[0], read_manifest(prefixes[0])
    for other in prefixes:
        theirs = read_manifest(other)
        if theirs["kind"] == "validation":
            raise ValueError(f"{other} is a validation set, whose labels a merge would lose: merge corpora and subsets")
        if (manifest.get("tokenizer") is None) != (theirs.get("tokenizer") is None):
            unknown = first if manifest.get("tokenizer") is None else other
            raise ValueError(
                f"{unknown} does not say which tokenizer made it, the others do: remove its manifest and describe it "
                "again with: tools/inspect_index.py adopt --tokenizer-type ... --tokenizer-model ..."
            )
        check_same_tokenizer(first, other)
        for key in ("dtype", "unit", "window_length"):
            if manifest.get(key) != theirs.get(key):
                raise ValueError(
                    f"{other} has {key} {theirs.get(key)}, but {first} has {manifest.get(key)}: only corpora of "
                    "the same kind can be merged; make one of them again"
                )


def _share_tokens(prefixes: Sequence[str]) -> bool:
    return len({os.path.realpath(f"{prefix}.bin") for prefix in [*prefixes, root_prefix(prefixes[0])]}) == 1


def _without_repeats(prefixes: Sequence[str], drop: bool) -> list[np.ndarray | None]:
    """Per corpus the units to take (None: all): those of a root that no corpus before it has."""
    seen: dict[str, np.ndarray] = {}
    taken: list[np.ndarray | None] = []
    for prefix in prefixes:
        root, units = root_digest(prefix), np.asarray(root_units(prefix))
        earlier = seen.get(root, np.zeros(0, dtype=np.int64))
        repeated = np.isin(units, earlier)
        if repeated.any() and not drop:
            raise ValueError(
                f"{np.count_nonzero(repeated)} units of {prefix} (the first: unit {int(repeated.argmax())}) are in "
                "another of the corpora too, expected each once: give --drop-repeated, or merge others"
            )
        taken.append(np.flatnonzero(~repeated) if repeated.any() else None)
        seen[root] = np.concatenate([earlier, units[~repeated]])
    return taken


def _write_merged(parts: Sequence[Part], prefixes: Sequence[str], folder: Path, label: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    units = sum(map(len, parts))
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=folder) as staging:
        index, tokens = Path(staging) / "idx", Path(staging) / "bin"
        with atomic_file(tokens) as stream:
            copier = UnitCopier(stream)
            for part in parts:
                copier.copy(part.corpus, part.ids)
        written = {**_write_index(index, parts), **copier.record()}
        digest = content_digest(written["index_sha256"], written["bin_sha256"])
        prefix = str(folder / f"{label}-{digest[:8]}")
        if os.path.exists(manifest_path(prefix)) and corpus_digest(prefix) == digest:
            return prefix
        _write_provenance(prefix, parts)
        os.replace(tokens, f"{prefix}.bin")
        os.replace(index, f"{prefix}.idx")
    sync_folder(folder)
    first, itemsize = read_manifest(prefixes[0]), parts[0].corpus.dtype.itemsize
    manifest = {
        "kind": "corpus",
        **{key: first.get(key) for key in ("unit", "window_length", "tokenizer", "dtype")},
        "counts": {"units": units, "tokens": written["bin_bytes"] // itemsize},
        **written,
        "label": label,
        "parents": [reference(prefix, folder) for prefix in prefixes],
        "sources": _sources(prefixes),
    }
    write_manifest(prefix, manifest)
    return prefix


def _write_index(path: Path, parts: Sequence[Part]) -> dict:
    """Lengths as they are, pointers one after another, documents shifted; returns the digests."""
    dtype, count = parts[0].corpus.dtype, sum(map(len, parts))
    firsts = np.cumsum([0, *map(len, parts)]).tolist()

    def lengths() -> Iterator[np.ndarray]:
        return (block for part in parts for block in part.blocks_of(part.corpus.lengths))

    def documents() -> Iterator[np.ndarray]:
        for part, first in zip(parts, firsts, strict=False):
            yield from part.documents(first)
        yield np.array([count], dtype=np.int64)

    num_documents = sum(part.num_documents for part in parts) + 1
    with atomic_file(path) as stream:
        digests = DigestWriter(stream)
        pointers = contiguous_pointers(lengths(), dtype.itemsize)
        write_index_blocks(digests, dtype, count, lengths(), pointers, (num_documents, documents()))
    return {"index_sha256": digests.sha256, "index_crc32": digests.crc32}


def _write_provenance(prefix: str, parts: Sequence[Part]) -> None:
    """One row per unit, in order, if any part has them; units of parts that do not know their sources name the part."""
    known = [os.path.isfile(f"{root_prefix(part.prefix)}.provenance.parquet") for part in parts]
    if not any(known):
        return
    with (
        atomic_file(f"{prefix}.provenance.parquet") as stream,
        pq.ParquetWriter(stream, SCHEMA, compression="zstd") as out,
    ):
        for part, is_known in zip(parts, known, strict=True):
            for block in blocks(len(part), PROVENANCE_BLOCK):
                ids = np.arange(block.start, block.stop) if part.ids is None else part.ids[block]
                rows = read_provenance(part.prefix, ids) if is_known else _nameless(part, ids)
                out.write_table(rows.select(SCHEMA.names).cast(SCHEMA), row_group_size=ROW_GROUP)


def _nameless(part: Part, ids: np.ndarray) -> pa.Table:
    """Rows that know no more than the corpus and the unit's number in it."""
    columns = {"file": [os.path.basename(part.prefix)] * len(ids), "line": ids}
    return pa.table({name: columns.get(name, pa.nulls(len(ids))) for name in SCHEMA.names})


def _sources(prefixes: Sequence[str]) -> list[dict]:
    """The source files of all roots, each once."""
    roots = {root_digest(prefix): root_prefix(prefix) for prefix in prefixes}
    return [source for root in roots.values() for source in read_manifest(root).get("sources", [])]
