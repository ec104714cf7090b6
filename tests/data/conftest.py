"""Tokenizers trained once for all data tests."""

import pytest

from tests.data.corpora import documents, write_lines
from tools import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory):
    """Paths of a small tokenizer of each kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    source = write_lines(folder / "text.jsonl", documents(60))
    files = {"huggingface": str(folder / "bpe.json"), "sentencepiece": str(folder / "sp.model"), "bytes": None}
    for kind, vocab_size in (("huggingface", 400), ("sentencepiece", 330)):
        status = train_tokenizer.main(
            ["--input", source, "--output", files[kind], "--tokenizer-type", kind, "--vocab-size", str(vocab_size)]
        )
        assert status == 0
    return files
