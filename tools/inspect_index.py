"""Look at a corpus, a subset or a validation set: show what it is, sample units with their source, verify the files.

inspect_index.py show X | sample X --count 5 | verify X | adopt X (describe a corpus made by other software).
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import numpy as np

from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.manifest import adopt_manifest, check_ids, corpus_digest, manifest_path, read_manifest
from megatron_bliss.data.subset import read_provenance, root_prefix, root_units
from megatron_bliss.data.tokenizers import KINDS, Tokenizer, load_recorded_tokenizer, load_tokenizer
from megatron_bliss.data.validation import ValidationCorpus
from megatron_bliss.files import sha256_file


def show(options: argparse.Namespace) -> None:
    """Header, lengths and manifest."""
    corpus = IndexedCorpus(options.prefix)
    lengths = np.sort(corpus.lengths)
    quantiles = (
        [int(lengths[int(share * (len(lengths) - 1))]) for share in (0, 0.25, 0.5, 0.75, 1)] if len(lengths) else []
    )
    follows = corpus.pointers[:-1] + corpus.lengths[:-1].astype(np.int64) * corpus.dtype.itemsize == corpus.pointers[1:]
    print(f"units       {len(corpus):,}\ntokens      {corpus.num_tokens:,}\ndtype       {corpus.dtype.name}")
    print(f"documents   {len(corpus.document_indices) - 1:,}")
    print(f"lengths     {quantiles} (least, quartiles, most)\ncontiguous  {'yes' if follows.all() else 'no'}")
    if os.path.islink(corpus.bin_path):
        print(f".bin        link to {os.readlink(corpus.bin_path)}")
    if os.path.exists(manifest_path(options.prefix)):
        print(json.dumps(read_manifest(options.prefix), indent=2, ensure_ascii=False))
    else:
        print("no manifest")


def sample(options: argparse.Namespace) -> None:
    """Some units as text, with where they come from."""
    corpus, tokenizer = IndexedCorpus(options.prefix), _tokenizer(options)
    generator = np.random.default_rng(options.seed)
    ids = np.sort(generator.choice(len(corpus), min(options.count, len(corpus)), replace=False))
    sources = _sources(options.prefix, ids)
    labels = ValidationCorpus(options.prefix) if _kind(options.prefix) == "validation" else None
    for row, unit in enumerate(ids):
        print(f"--- unit {unit}, {corpus.lengths[unit]} tokens {sources[row]}")
        print(tokenizer.decode(corpus[unit][: options.max_tokens]))
        if labels is not None:
            tokens, mask, _ = labels.gather(ids[row : row + 1], int(corpus.lengths[unit]))
            print(f"[label: {tokenizer.decode(tokens[mask][: options.max_tokens])!r}]")


def verify(options: argparse.Namespace) -> None:
    """Structure, digests, and a subset's root; ValueError at the first thing that is wrong."""
    prefix = options.prefix
    corpus, manifest = IndexedCorpus(prefix), read_manifest(prefix)
    corpus_digest(prefix)
    if manifest["counts"]["units"] != len(corpus) or manifest["counts"]["tokens"] != corpus.num_tokens:
        raise ValueError(
            f"{prefix}.idx has {len(corpus)} units, {corpus.num_tokens} tokens; its manifest {manifest['counts']}"
        )
    found = sha256_file(corpus.bin_path)
    if found != manifest["bin_sha256"]:
        raise ValueError(f"{prefix}.bin has digest {found[:12]}, expected {manifest['bin_sha256'][:12]}: make it again")
    if manifest.get("tokenizer"):
        check_ids(corpus, manifest["tokenizer"]["vocab_size"])
    if manifest["kind"] == "subset":
        _verify_subset(corpus, prefix)
    if manifest["kind"] == "validation":
        ValidationCorpus(prefix)
    print(f"{prefix}: {len(corpus):,} units, {corpus.num_tokens:,} tokens, as its manifest says")


def adopt(options: argparse.Namespace) -> None:
    """Write a manifest for a corpus made by other software."""
    tokenizer = None
    if options.tokenizer_type:
        tokenizer = load_tokenizer(
            options.tokenizer_type, options.tokenizer_model, eod_token=options.eod_token
        ).identity()
    manifest = adopt_manifest(options.prefix, tokenizer)
    print(f"{manifest_path(options.prefix)}: {manifest['counts']['units']:,} units, digest {manifest['digest'][:12]}")


def _verify_subset(corpus: IndexedCorpus, prefix: str) -> None:
    root, units = IndexedCorpus(root_prefix(prefix)), root_units(prefix)
    if not os.path.samefile(root.bin_path, corpus.bin_path):
        raise ValueError(f"{corpus.bin_path} is not {root.bin_path}, which it should link to: make the subset again")
    if (root.pointers[units] != corpus.pointers).any() or (root.lengths[units] != corpus.lengths).any():
        raise ValueError(f"{prefix}.units.npy does not fit {prefix}.idx: make the subset again")


def _kind(prefix: str) -> str | None:
    return read_manifest(prefix)["kind"] if os.path.exists(manifest_path(prefix)) else None


def _tokenizer(options: argparse.Namespace) -> Tokenizer:
    if options.tokenizer_type:
        return load_tokenizer(options.tokenizer_type, options.tokenizer_model, eod_token=options.eod_token)
    return load_recorded_tokenizer(read_manifest(options.prefix).get("tokenizer"), options.tokenizer_model)


def _sources(prefix: str, ids: np.ndarray) -> list[str]:
    if _kind(prefix) not in ("corpus", "subset") or not os.path.exists(f"{root_prefix(prefix)}.provenance.parquet"):
        return [""] * len(ids)
    rows = read_provenance(prefix, ids).to_pylist()
    return [json.dumps({name: value for name, value in row.items() if value is not None}) for row in rows]


COMMANDS = {"show": show, "sample": sample, "verify": verify, "adopt": adopt}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("command", choices=list(COMMANDS), help="what to do")
    add("prefix", help="path without .bin/.idx")
    add("--count", type=int, default=5, help="sample: number of units")
    add("--max-tokens", type=int, default=200, help="sample: tokens shown of each unit")
    add("--seed", type=int, default=0, help="sample: which units")
    add("--tokenizer-type", choices=list(KINDS), help="sample, adopt: kind of tokenizer, where no manifest says")
    add("--tokenizer-model", help="sample, adopt: tokenizer file, if it is not where the manifest says")
    add("--eod-token", help="adopt: token that ends a document, if it is not one of the usual ones")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    try:
        COMMANDS[options.command](options)
    except (ValueError, OSError) as error:
        print(f"inspect_index: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
