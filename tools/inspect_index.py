"""Look at a corpus, a subset or a validation set.

inspect_index.py show X | sample X --count 5 | verify X | diff X Y | adopt X (describe a corpus made by other software).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping

import numpy as np

from megatron_bliss.base.command import command
from megatron_bliss.base.text import align
from megatron_bliss.data.compare import compare_units
from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.manifest import adopt_manifest, manifest_path, read_manifest
from megatron_bliss.data.provenance import read_provenance
from megatron_bliss.data.subset import root_prefix
from megatron_bliss.data.tokenizers import KINDS, Tokenizer, load_recorded_tokenizer, load_tokenizer
from megatron_bliss.data.validation import ValidationCorpus
from megatron_bliss.data.verify import is_contiguous, verify_corpus

QUANTILES = (0, 0.25, 0.5, 0.75, 1)


def show(options: argparse.Namespace) -> dict:
    """Header, lengths and manifest."""
    corpus = IndexedCorpus(options.prefix)
    found = {
        "units": len(corpus),
        "tokens": corpus.num_tokens,
        "documents": len(corpus.document_indices) - 1,
        "dtype": corpus.dtype.name,
        "lengths": np.quantile(corpus.lengths, QUANTILES, method="lower").tolist() if len(corpus) else [],
        "contiguous": is_contiguous(corpus),
        "bin_bytes": corpus.bin_bytes,
        "link_to": os.readlink(corpus.bin_path) if os.path.islink(corpus.bin_path) else None,
        "manifest": read_manifest(options.prefix) if os.path.exists(manifest_path(options.prefix)) else None,
    }
    if not options.json:
        print_fields(_shown(found))
    return found


def sample(options: argparse.Namespace) -> dict:
    """Some units as text, with where they come from."""
    corpus, tokenizer = IndexedCorpus(options.prefix), _tokenizer(options)
    generator = np.random.default_rng(options.seed)
    ids = np.sort(generator.choice(len(corpus), min(options.count, len(corpus)), replace=False))
    sources = _sources(options.prefix, ids)
    labels = ValidationCorpus(options.prefix) if _kind(options.prefix) == "validation" else None
    found = []
    for row, unit in enumerate(ids.tolist()):
        entry = {"unit": unit, "tokens": int(corpus.lengths[unit]), "source": sources[row]}
        entry["text"] = tokenizer.decode(corpus[unit][: options.max_tokens])
        if labels is not None:
            tokens, mask, _ = labels.gather(ids[row : row + 1], entry["tokens"])
            entry["label"] = tokenizer.decode(tokens[mask][: options.max_tokens])
        found.append(entry)
    if not options.json:
        print_samples(found)
    return {"samples": found}


def verify(options: argparse.Namespace) -> dict:
    """Every file against every other; ValueError at the first thing that is wrong."""
    found = verify_corpus(options.prefix, caches=options.cache)
    if not options.json:
        print(f"{options.prefix}: {found['units']:,} units, {found['tokens']:,} tokens, as its manifest says")
        print_fields({name: value for name, value in found.items() if name not in ("units", "tokens")})
    return found


def diff(options: argparse.Namespace) -> dict:
    """Two subsets of one corpus: what they share, and how the domains differ."""
    if not options.other:
        raise ValueError("diff compares two corpora, expected two prefixes: diff X Y")
    found = compare_units(options.prefix, options.other, options.field)
    if not options.json:
        print_fields({name: value for name, value in found.items() if name != "shares"})
        rows = [(name, f"{a:.1%}", f"{b:.1%}", f"{b - a:+.1%}") for name, (a, b) in found["shares"].items()]
        if rows:
            print("\n" + align(f"Share of units by {options.field}", [options.field, "first", "second", "shift"], rows))
    return found


def adopt(options: argparse.Namespace) -> dict:
    """Write a manifest for a corpus made by other software."""
    tokenizer = None
    if options.tokenizer_type:
        tokenizer = load_tokenizer(
            options.tokenizer_type, options.tokenizer_model, eod_token=options.eod_token
        ).identity()
    manifest = adopt_manifest(options.prefix, tokenizer)
    if not options.json:
        units, digest = manifest["counts"]["units"], manifest["digest"][:12]
        print(f"{manifest_path(options.prefix)}: {units:,} units, digest {digest}")
    return manifest


def print_fields(fields: Mapping[str, object]) -> None:
    """One aligned line per field; numbers with thousands separated, None left out."""
    width = max(map(len, fields)) + 2
    for name, value in fields.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, int):
            value = f"{value:,}"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        if value is not None:
            print(f"{name.replace('_', ' '):<{width}}{value}")


def print_samples(samples: list[dict]) -> None:
    """Units as text, each under a line with its number and source."""
    for entry in samples:
        source = "  ".join(f"{name}={value}" for name, value in entry["source"].items() if value is not None)
        print(f"--- unit {entry['unit']:,}, {entry['tokens']:,} tokens  {source}".rstrip())
        print(entry["text"])
        if "label" in entry:
            print(f"[label: {entry['label']!r}]")


def _shown(found: dict) -> dict:
    """What ``show`` prints: the header, then the manifest's plain keys, then what its nested ones come to."""
    manifest = found["manifest"]
    lengths = " / ".join(f"{length:,}" for length in found["lengths"])
    fields = {**{name: value for name, value in found.items() if name != "manifest"}}
    fields |= {"lengths": f"{lengths}  (least, quartiles, most)" if lengths else "none"}
    if manifest is None:
        return fields | {"manifest": "none: describe the corpus with adopt"}
    for name, value in manifest.items():
        if name in fields or name in ("counts", "sources", "parents", "format_version", "index_crc32"):
            continue
        fields[name] = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
    for name in ("sources", "parents"):
        if name in manifest:
            fields[name] = f"{len(manifest[name])} (--json lists them)"
    others = {name: value for name, value in manifest["counts"].items() if name not in ("units", "tokens")}
    return fields | others


def _kind(prefix: str) -> str | None:
    return read_manifest(prefix)["kind"] if os.path.exists(manifest_path(prefix)) else None


def _tokenizer(options: argparse.Namespace) -> Tokenizer:
    if options.tokenizer_type:
        return load_tokenizer(options.tokenizer_type, options.tokenizer_model, eod_token=options.eod_token)
    return load_recorded_tokenizer(read_manifest(options.prefix).get("tokenizer"), options.tokenizer_model)


def _sources(prefix: str, ids: np.ndarray) -> list[dict]:
    if _kind(prefix) not in ("corpus", "subset") or not os.path.exists(f"{root_prefix(prefix)}.provenance.parquet"):
        return [{}] * len(ids)
    return read_provenance(prefix, ids).to_pylist()


COMMANDS = {"show": show, "sample": sample, "verify": verify, "diff": diff, "adopt": adopt}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("command", choices=list(COMMANDS), help="what to do")
    add("prefix", help="path without .bin/.idx")
    add("other", nargs="?", help="diff: the second prefix")
    add("--json", action="store_true", help="print one JSON object")
    add("--cache", nargs="+", default=[], help="verify: folders in which megatron-core keeps dataset caches")
    add("--field", default="domain", help="diff: column of the provenance whose shares are compared")
    add("--count", type=int, default=5, help="sample: number of units")
    add("--max-tokens", type=int, default=200, help="sample: tokens shown of each unit")
    add("--seed", type=int, default=0, help="sample: which units")
    add("--tokenizer-type", choices=list(KINDS), help="sample, adopt: kind of tokenizer, where no manifest says")
    add("--tokenizer-model", help="sample, adopt: tokenizer file, if it is not where the manifest says")
    add("--eod-token", help="adopt: token that ends a document, if it is not one of the usual ones")
    return parser.parse_args(arguments)


@command("inspect_index", (ValueError, OSError))
def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    found = COMMANDS[options.command](options)
    if options.json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
