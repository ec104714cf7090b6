"""What tests of several tools take."""

import json

import numpy as np
import pytest

from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.manifest import corpus_digest
from tests.data.corpora import documents, write_lines


@pytest.fixture
def scored(tmp_path):
    """A corpus of 30 documents in three domains, whose scores favour the domain letter; prefix and path of scores."""
    source = write_lines(tmp_path / "a.jsonl", documents(30))
    prefix = str(tmp_path / "X")
    preprocess(PreprocessSettings(inputs=[source], output_prefix=prefix, tokenizer_type="bytes"))
    scores = (np.arange(30) % 3 == 1).astype(np.float32)
    np.save(tmp_path / "scores.npy", scores)
    (tmp_path / "scores.json").write_text(json.dumps({"corpus_digest": corpus_digest(prefix)}))
    return prefix, str(tmp_path / "scores.npy")
