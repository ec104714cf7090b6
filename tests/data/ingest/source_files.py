"""Source files of every kind, and corpora from them, for tests."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.tokenizers import load_tokenizer

FORMATS = (
    "jsonl", "json", "jsonl.gz", "json.gz", "jsonl.zst", "json.zst", "parquet", "txt", "txt.gz", "txt.zst",
)  # fmt: skip
COMPRESS = {"": bytes, ".gz": lambda data: gzip.compress(data, 6, mtime=0), ".zst": zstandard.compress}


def write_source(path: Path, records: list[dict], *, row_group_size: int = 7) -> str:
    """Write records in the format that the name asks for; returns the path as a string."""
    if path.suffix == ".parquet":
        names = list(dict.fromkeys(name for record in records for name in record))
        table = pa.table({name: [record.get(name) for record in records] for name in names})
        pq.write_table(table, path, row_group_size=row_group_size)
        return str(path)
    if ".txt" in path.suffixes:
        lines = [record["text"].encode() for record in records]
    else:
        lines = [json.dumps(record, ensure_ascii=False).encode() for record in records]
    end = path.suffix if path.suffix in COMPRESS else ""
    path.write_bytes(COMPRESS[end](b"".join(line + b"\n" for line in lines)))
    return str(path)


def make(folder: Path, inputs: list[str], name: str = "X", **changes) -> tuple[dict, IndexedCorpus]:
    """Preprocess with the bytes tokenizer, or what ``changes`` say; returns the manifest and the corpus."""
    settings = PreprocessSettings(
        inputs=inputs, output_prefix=str(folder / name), **{"tokenizer_type": "bytes", **changes}
    )
    return preprocess(settings), IndexedCorpus(settings.prefix)


def rejected(folder: Path, name: str = "X") -> list[dict]:
    """Entries of X.rejected.jsonl."""
    return [orjson.loads(line) for line in (folder / f"{name}.rejected.jsonl").read_bytes().splitlines()]


def build_with_megatron(prefix: Path, texts: list[str], kind: str, model: str | None, *, append_eod: bool) -> None:
    """The same corpus, document by document, by megatron-core's own builder and the tokenizer's own library."""
    tokenizer = load_tokenizer(kind, model)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for text in texts:
        ids = tokenizer.encode_batch([text])[0] + [tokenizer.eod] * append_eod
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def same_files(first: str | Path, second: str | Path, suffixes: tuple[str, ...] = (".bin", ".idx")) -> bool:
    """Whether two prefixes have the same bytes in their files."""
    return all(Path(f"{first}{end}").read_bytes() == Path(f"{second}{end}").read_bytes() for end in suffixes)
