"""``X.manifest.json``: what a corpus, a subset or a validation set was made from, and how to know it again.

Keys of every manifest: ``format_version``, ``kind`` (corpus, subset, validation), ``unit``, ``tokenizer`` (kind,
sha256, vocab_size, eod; None for a corpus of other software), ``dtype``, ``counts`` (units, tokens, ...),
``index_sha256``, ``bin_bytes``, ``bin_sha256`` and ``digest``, which stands for index and tokens together. Most also
have ``index_crc32``, by which an index is known again quickly.
"""

from __future__ import annotations

import json
import os

from megatron_bliss.base.files import crc32_file, read_json, sha256_file, sha256_text, write_json
from megatron_bliss.data.indexed import IndexedCorpus, blocks

FORMAT_VERSION = 1
KINDS = ("corpus", "subset", "validation")
REQUIRED = ("format_version", "kind", "unit", "counts", "index_sha256", "bin_bytes", "bin_sha256", "digest")


def manifest_path(prefix: str | os.PathLike) -> str:
    """``X.manifest.json`` for prefix ``X``."""
    return f"{prefix}.manifest.json"


def content_digest(index_sha256: str, bin_sha256: str) -> str:
    """One digest for an index and the tokens it points into."""
    return sha256_text(index_sha256, bin_sha256)


def write_manifest(prefix: str | os.PathLike, manifest: dict) -> dict:
    """Complete a manifest with format version and digest, write it, and return it."""
    digest = content_digest(manifest["index_sha256"], manifest["bin_sha256"])
    manifest = {"format_version": FORMAT_VERSION, **manifest, "digest": digest}
    missing = [key for key in REQUIRED if key not in manifest]
    assert not missing, f"manifest without {missing}"
    write_json(manifest_path(prefix), manifest)
    return manifest


def read_manifest(prefix: str | os.PathLike) -> dict:
    """Read ``X.manifest.json``; ValueError when it is missing, damaged or of another format version."""
    path = manifest_path(prefix)
    if not os.path.isfile(path):
        raise ValueError(
            f"{path} does not exist; finish tools/preprocess_data.py, or give a corpus made by other "
            f"software a manifest with: python tools/inspect_index.py adopt {prefix}"
        )
    manifest = read_json(path)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {manifest.get('format_version')}, expected {FORMAT_VERSION}")
    missing = [key for key in REQUIRED if key not in manifest]
    missing += ["root"] if manifest.get("kind") == "subset" and "root" not in manifest else []
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; it is damaged: make the corpus again")
    counts = manifest["counts"]
    numbers = (
        [manifest["bin_bytes"], *(counts.get(key) for key in ("units", "tokens"))]
        if isinstance(counts, dict)
        else [None]
    )
    if manifest["kind"] not in KINDS or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(
            f"{path} has kind {manifest['kind']!r}, counts {counts} and bin_bytes {manifest['bin_bytes']}, expected "
            f"one of {', '.join(KINDS)} and whole numbers; it is damaged: make the corpus again"
        )
    return manifest


def corpus_digest(prefix: str | os.PathLike, *, thorough: bool = False) -> str:
    """The digest of a corpus, held against its files: the index is read and compared, and the size of ``.bin``.

    The index is compared by its CRC-32 where the manifest has one, which finds every accident (an index rewritten under
    an old name, a damaged block) in a fraction of the time; ``thorough`` or an older manifest: by its SHA-256.
    Raises ValueError when the files are not those the manifest describes.
    """
    manifest = read_manifest(prefix)
    quick = not thorough and "index_crc32" in manifest
    found = crc32_file(f"{prefix}.idx") if quick else sha256_file(f"{prefix}.idx")
    expected = manifest["index_crc32" if quick else "index_sha256"]
    if found != expected:
        raise ValueError(
            f"{prefix}.idx has digest {str(found)[:12]}, expected {str(expected)[:12]} from its manifest: the index "
            "was rewritten under an old name; make it again under a new one"
        )
    size = os.path.getsize(f"{prefix}.bin")
    if size != manifest["bin_bytes"]:
        raise ValueError(
            f"{prefix}.bin has {size} bytes, expected {manifest['bin_bytes']} from its manifest: it is "
            "truncated or was replaced; make it again"
        )
    return manifest["digest"]


def finished_manifest(prefix: str | os.PathLike, wanted: dict, files: list[str]) -> dict | None:
    """The manifest of a finished corpus made from these files with these settings; None if there is nothing yet.

    wanted: manifest keys that have to agree, ``tokenizer`` among them. Raises ValueError when the name is taken by
    anything else: finished work is never overwritten.
    """
    if not os.path.exists(manifest_path(prefix)):
        taken = [f"{prefix}{suffix}" for suffix in (".bin", ".idx") if os.path.exists(f"{prefix}{suffix}")]
        if taken:
            raise ValueError(
                f"{taken[0]} exists without a manifest, so it is not known what it is: remove it or change "
                "--output-prefix"
            )
        return None
    manifest = read_manifest(prefix)
    differences = [key for key in wanted if _comparable(manifest.get(key)) != _comparable(wanted[key])]
    if not differences and not _same_sources(manifest.get("sources", []), files):
        differences = ["sources"]
    if differences:
        raise ValueError(
            f"{manifest_path(prefix)} is finished with another {' and '.join(differences)}: remove what it "
            "describes or change --output-prefix"
        )
    return manifest


def _comparable(value: object) -> object:
    """A manifest value as JSON holds it, without the place of the tokenizer's file."""
    value = json.loads(json.dumps(value))
    return {key: part for key, part in value.items() if key != "file"} if isinstance(value, dict) else value


def _same_sources(recorded: list[dict], files: list[str]) -> bool:
    now = [(os.path.basename(file), os.path.getsize(file)) for file in files]
    if now != [(os.path.basename(entry["file"]), entry["bytes"]) for entry in recorded]:
        return False
    return all(sha256_file(file) == entry["sha256"] for file, entry in zip(files, recorded, strict=True))


def adopt_manifest(prefix: str | os.PathLike, tokenizer: dict | None, unit: str = "document") -> dict:
    """Write a manifest for a ``.bin``/``.idx`` pair made by other software (reads all of ``.bin``).

    tokenizer: :meth:`Tokenizer.identity` of what made it, or None; ValueError when its vocabulary is too small.
    """
    if os.path.exists(manifest_path(prefix)):
        raise ValueError(f"{manifest_path(prefix)} exists already; remove it first to describe the files anew")
    corpus = IndexedCorpus(prefix)
    if tokenizer:
        check_ids(corpus, tokenizer["vocab_size"])
    manifest = {
        "kind": "corpus",
        "unit": unit,
        "tokenizer": tokenizer,
        "dtype": corpus.dtype.name,
        "counts": {"units": len(corpus), "tokens": corpus.num_tokens},
        "index_sha256": sha256_file(corpus.index_path),
        "index_crc32": crc32_file(corpus.index_path),
        "bin_bytes": corpus.bin_bytes,
        "bin_sha256": sha256_file(corpus.bin_path),
    }
    return write_manifest(prefix, manifest)


def check_ids(corpus: IndexedCorpus, vocab_size: int) -> None:
    """Raise ValueError when ``.bin`` holds a token id that the vocabulary does not have."""
    for part in blocks(len(corpus.tokens)):
        least, largest = int(corpus.tokens[part].min()), int(corpus.tokens[part].max())
        if least < 0 or largest >= vocab_size:
            raise ValueError(
                f"{corpus.bin_path} holds ids from {least} to {largest}, but the vocabulary ends at {vocab_size - 1}: "
                "it was made with another tokenizer"
            )


def check_same_tokenizer(prefix_a: str | os.PathLike, prefix_b: str | os.PathLike) -> None:
    """Raise ValueError when two corpora were not tokenised with the same tokenizer (kind, file and EOD)."""
    first, second = (_tokenizer_identity(prefix) for prefix in (prefix_a, prefix_b))
    if None not in (first, second) and first != second:
        raise ValueError(
            f"{prefix_a} was tokenised with {_describe(first)}, but {prefix_b} with {_describe(second)}: "
            "make both with the same --tokenizer-type, --tokenizer-model and --eod-token"
        )


def _tokenizer_identity(prefix: str | os.PathLike) -> dict | None:
    tokenizer = read_manifest(prefix).get("tokenizer")
    return tokenizer and {key: tokenizer.get(key) for key in ("kind", "sha256", "vocab_size", "eod")}


def _describe(tokenizer: dict) -> str:
    return (
        f"{tokenizer['kind']} {str(tokenizer['sha256'])[:12]} ({tokenizer['vocab_size']} ids, EOD {tokenizer['eod']})"
    )
