"""Small corpora and tokenizers made on the spot, for tests."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_bliss.data.corpus_writer import CorpusWriter
from megatron_bliss.data.manifest import adopt_manifest

SENTENCES = (
    "The river was high that spring, and the old bridge did not look safe to anyone who knew the river.",
    "She had carried the letter for a week before she found the courage to open the letter.",
    "Nobody in the village could remember a winter as long as this winter.",
    "A good map says less about the land than about the people who needed the map.",
    "Über die Brücke ging ein alter Mann, der die Brücke gebaut hatte.",
)
PASSAGES = (
    "They reached the harbour at night, and although it was late there was still a light in the harbour",
    "He asked for bread and they gave him bread",
    "Der Zug hielt im Dorf, und niemand stieg aus im Dörfchen",
    "It was “strange,” she said — very strange",
)


def write_corpus(prefix: Path, lengths: list[int], vocab_size: int = 60_000, *, seed: int = 0) -> np.ndarray:
    """Write a corpus with random tokens and a manifest; returns its tokens, one unit after another."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, sum(lengths))
    with CorpusWriter(prefix, vocab_size) as writer:
        writer.add(tokens, np.array(lengths))
    adopt_manifest(prefix, {"kind": "bytes", "sha256": "0" * 64, "vocab_size": vocab_size, "eod": 0, "file": None})
    return tokens


def write_lines(path: Path, records: list) -> str:
    """Write JSON lines (bytes as they are), gzipped if the name says so; returns the path as a string."""
    lines = b"".join((entry if isinstance(entry, bytes) else json.dumps(entry).encode()) + b"\n" for entry in records)
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


def documents(count: int, seed: int = 0) -> list[dict]:
    """Records with text of a few sentences, url and domain."""
    generator = np.random.default_rng(seed)
    return [
        {
            "text": "\n".join(generator.choice(SENTENCES, generator.integers(1, 6))) + f" ({number})",
            "url": f"https://example.org/{number}",
            "domain": ["river", "letter", "winter"][number % 3],
        }
        for number in range(count)
    ]


def write_named_units(prefix, count=40, seed=3):
    """A corpus whose unit u holds only the token u + 1; returns the lengths."""
    lengths = np.random.default_rng(seed).integers(3, 12, count)
    with CorpusWriter(prefix, 1000) as writer:
        writer.add(np.repeat(np.arange(1, count + 1), lengths), lengths)
    adopt_manifest(prefix, None)
    return lengths


class StubTokenizer:
    """What GPTDataset asks of a tokenizer."""

    vocab_size, eod, pad = 1000, 0, -1
    unique_identifiers = {"kind": "stub"}


def gpt_dataset(prefix, cache, num_samples, sequence_length=8):
    """Stock megatron-core dataset over one prefix."""
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=sequence_length,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=StubTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(str(prefix))
    indices = np.arange(len(indexed), dtype=np.int32)
    return GPTDataset(indexed, str(prefix), indices, num_samples, Split.train, config)
