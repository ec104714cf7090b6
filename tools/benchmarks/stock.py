"""The stock way to make a corpus, in one process: gzip and json of the standard library, Hugging Face ``encode_batch``,
and megatron-core's ``IndexedDatasetBuilder`` fed document by document.

    python -m tools.benchmarks.stock INPUT.json.gz OUTPUT_PREFIX TOKENIZER.json EOD

Prints the CPU seconds of the work, all threads, without those of starting Python and importing the libraries.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Iterator

BATCH = 1000  # documents tokenised at once


def batches(path: str) -> Iterator[list[str]]:
    """Texts of a gzipped file of JSON lines."""
    texts: list[str] = []
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            text = json.loads(line)["text"]
            if not text.strip():
                continue  # this package sets empty texts aside, and both shall write the same bytes
            texts.append(text)
            if len(texts) == BATCH:
                yield texts
                texts = []
    if texts:
        yield texts


def main(source: str, prefix: str, tokenizer_path: str, eod: int) -> float:
    """Make the corpus; returns the CPU seconds it took."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from tokenizers import Tokenizer

    start = time.process_time()
    tokenizer = Tokenizer.from_file(tokenizer_path)
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for texts in batches(source):
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
            ids = [*encoding.ids, eod]
            builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return time.process_time() - start


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
