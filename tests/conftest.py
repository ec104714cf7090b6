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
