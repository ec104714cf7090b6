"""Make a corpus to try things on from the text of this Python installation: no network, the same files every time.

Writes OUT/pool-*.jsonl.gz in C4's shape (text, url, timestamp, domain): prose from documentation, code, licences,
tables, and labelled damage of kinds that crawls hold (boilerplate, encoded, shuffled, mojibake); and prose that is
nowhere in the pool: OUT/validation.jsonl.gz, OUT/heldout.jsonl.gz, and OUT/heldout_cloze.jsonl.gz (passages whose
last word is to be told). OUT/heldout_other.jsonl.gz holds code and tables that are not in the pool: what a selection
that wants prose does not speak for.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator

from megatron_bliss.base.command import command
from megatron_bliss.base.files import atomic_file
from megatron_bliss.data import cloze
from megatron_bliss.data.demo import domains
from megatron_bliss.data.demo.installation import InstallationText, read_installation

TIMESTAMP = "2024-01-01T00:00:00Z"
PROSE_SHARES = {"pool": 0.55, "shuffled": 0.24, "mojibake": 0.09, "validation": 0.03, "heldout": 0.03, "cloze": 0.06}
"""How prose documents are dealt; no document goes to two of them."""
CHARACTERS = {
    "prose": 1.0,
    "code": 0.5,
    "licence": 0.65,
    "table": 0.25,
    "boilerplate": 0.6,
    "encoded": 0.18,
    "shuffled": 0.43,
    "mojibake": 0.25,
}
"""Size of each domain relative to prose, so that prose is a fifth of the pool in tokens and the others share the rest
about equally (measured with byte-level BPEs of 4,096 and 8,192 ids trained on the pool)."""

OTHER = ("code", "table")
"""Domains of the held-out set of other kinds."""
OTHER_CHARACTERS = 8_000
"""Its size in each of them: about 128 samples of 64 tokens in all, so that measuring on it takes little time."""


def deal_prose(documents: list[domains.Document], generator: random.Random) -> dict[str, list[domains.Document]]:
    """Disjoint lists of prose documents by purpose, in random order, by :data:`PROSE_SHARES` of all."""
    documents = generator.sample(documents, len(documents))
    dealt, start = {}, 0.0
    for purpose, share in PROSE_SHARES.items():
        dealt[purpose] = documents[round(start * len(documents)) : round((start + share) * len(documents))]
        start += share
    return dealt


def take(documents: Iterable[domains.Document], characters: int) -> list[domains.Document]:
    """Documents until they hold that many characters, or run out."""
    taken, size = [], 0
    for document in documents:
        if size >= characters:
            break
        taken.append(document)
        size += len(document[1])
    return taken


def make_sources(
    found: InstallationText, prose: dict[str, list[domains.Document]], generator: random.Random
) -> dict[str, Iterator[domains.Document]]:
    """Documents of every domain, made as they are taken."""
    return {
        "prose": iter(prose["pool"]),
        "code": domains.code(found.code, generator),
        "licence": domains.licences(found.licences, generator),
        "table": domains.tables(generator),
        "boilerplate": domains.boilerplate(generator),
        "encoded": domains.encoded(found.code, generator),
        "shuffled": domains.shuffled(prose["shuffled"], generator),
        "mojibake": domains.mojibake(prose["mojibake"], generator),
    }


def make_pool(
    sources: dict[str, Iterator[domains.Document]], available_prose: int, characters: int
) -> dict[str, list[domains.Document]]:
    """Documents of every domain; ``characters`` is the size of the whole pool, less when the prose does not suffice."""
    unit = min(available_prose, characters / sum(CHARACTERS.values()))
    return {domain: take(documents, int(unit * CHARACTERS[domain])) for domain, documents in sources.items()}


def take_other(
    sources: dict[str, Iterator[domains.Document]], pool: dict[str, list[domains.Document]]
) -> dict[str, list[domains.Document]]:
    """Documents of the domains in :data:`OTHER` that the pool has left, without texts that it holds, too."""
    taken = {text for domain in OTHER for _, text in pool[domain]}
    return {domain: take((one for one in sources[domain] if one[1] not in taken), OTHER_CHARACTERS) for domain in OTHER}


def write_jsonl(path: str, records: Iterable[dict]) -> None:
    """Write gzipped JSON lines, without the time of writing in them."""
    with (
        atomic_file(path) as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=6, mtime=0) as stream,
    ):
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")


def record(document: domains.Document, domain: str) -> dict:
    """One line in C4's shape, and its domain."""
    name, text = document
    return {"text": text, "url": f"python-installation://{name}", "timestamp": TIMESTAMP, "domain": domain}


def make_demo_corpus(folder: str, megabytes: float, files: int, seed: int) -> dict[str, list[domains.Document]]:
    """Write the corpus; returns the documents of each domain and of the held-out sets."""
    generator = random.Random(seed)
    found = read_installation(max_code_bytes=int(megabytes * 2e5))
    prose = deal_prose(domains.prose(found.prose, generator), generator)
    sources = make_sources(found, prose, generator)
    pool = make_pool(sources, sum(len(text) for _, text in prose["pool"]), int(megabytes * 1e6))
    passages = [(name, passage) for name, text in prose["cloze"] for passage in cloze.passages(text)]
    os.makedirs(folder, exist_ok=True)
    records = [record(document, domain) for domain, documents in pool.items() for document in documents]
    generator.shuffle(records)
    for number in range(files):
        write_jsonl(f"{folder}/pool-{number:05d}-of-{files:05d}.jsonl.gz", records[number::files])
    held_out = {"validation": prose["validation"], "heldout": prose["heldout"], "heldout_cloze": passages}
    for name, documents in held_out.items():
        write_jsonl(f"{folder}/{name}.jsonl.gz", (record(document, "prose") for document in documents))
    other = take_other(sources, pool)
    records = (record(document, domain) for domain, documents in other.items() for document in documents)
    write_jsonl(f"{folder}/heldout_other.jsonl.gz", records)
    return {**pool, **held_out, "heldout_other": [document for documents in other.values() for document in documents]}


def print_sizes(made: dict[str, list[domains.Document]]) -> None:
    """A table of documents and megabytes."""
    print(f"{'':<14}{'documents':>10}{'MB':>8}")
    for name, documents in made.items():
        size = sum(len(text.encode("utf-8")) for _, text in documents)
        print(f"{name:<14}{len(documents):>10,}{size / 1e6:>8.2f}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--megabytes", type=float, default=16.0, help="size of the pool in millions of characters")
    parser.add_argument("--files", type=int, default=2, help="number of pool files")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the choice and order of documents")
    return parser.parse_args(arguments)


@command("make_demo_corpus")
def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    if options.megabytes <= 0 or options.files < 1:
        raise ValueError("--megabytes and --files must be positive")
    print_sizes(make_demo_corpus(options.output, options.megabytes, options.files, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
