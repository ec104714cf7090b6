"""What tests of several rooms take."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder with all that a tiny run needs; ``tests/runs.py`` starts runs on it."""
    from tests.runs import write_corpus  # here: most tests need nothing of what it imports

    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A corpus of one unit."""
    from megatron_bliss.data.corpus_writer import CorpusWriter
    from megatron_bliss.data.manifest import adopt_manifest

    path = str(tmp_path / "corpus")
    with CorpusWriter(path, 300) as writer:
        writer.add([1, 2, 3], [3])
    adopt_manifest(path, {"kind": "bytes", "sha256": "0", "vocab_size": 257, "eod": 256})
    return path


@pytest.fixture
def options(prefix: str) -> list[str]:
    """The shortest command line of a run that passes."""
    data = [f"--data.{name}={prefix}" for name in ("train_prefix", "validation_prefix")]
    models = ["--target.preset=pythia-14m", "--proxy.preset=pythia-14m"]
    return ["--run_folder=run", *data, f"--data.test_prefixes=[{prefix}]", *models]


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory) -> dict[str, str | None]:
    """Paths of a small tokenizer of each kind, trained once."""
    from tests.data.corpora import documents, write_lines
    from tools import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    source = write_lines(folder / "text.jsonl", documents(60))
    files = {"huggingface": str(folder / "bpe.json"), "sentencepiece": str(folder / "sp.model"), "bytes": None}
    for kind, vocab_size in (("huggingface", 400), ("sentencepiece", 330)):
        status = train_tokenizer.main(
            ["--input", source, "--output", files[kind], "--tokenizer-type", kind, "--vocab-size", str(vocab_size)]
        )
        assert status == 0
    return files
