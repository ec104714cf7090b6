"""A finished study, made once for all tests of studies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import write_corpus
from tests.study.studies import run_tool, write_study


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def given(corpus: Path, tmp_path_factory) -> Path:
    compared = ["hard/dsir", "soft/dsir", "hard/random"]
    return write_study(tmp_path_factory.mktemp("given"), corpus, agreement=compared)


@pytest.fixture(scope="session")
def finished(given: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("studies") / "whole"
    result = run_tool(given, output)
    assert result.returncode == 0, result.stderr
    assert "[1/4] seed 1, hard: arms random, dsir; log: " in result.stdout
    assert "[4/4] seed 2, soft: arms random, dsir, warm-up of hard; log: " in result.stdout
    assert (output / "study.md").read_text() in result.stdout
    return output
