"""A finished run, made once for a test file."""

from pathlib import Path

import pytest

from tests.report.run_folders import write_whole_run


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole & <b>hostile</b>"
    write_whole_run(folder)
    return folder
