"""The tables of docs/results against the study.json beside a page: NAME.md has each row that NAME.json gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_bliss.study.cells import table
from megatron_bliss.study.table import format_study

RESULTS = Path(__file__).parents[1] / "docs" / "results"
"""Pages of studies, and the data that they are made from."""


def studies(folder: Path) -> list[Path]:
    """The files that are a study.json; headline.json, for one, is none."""
    return [path for path in sorted(folder.glob("*.json")) if "points" in json.loads(path.read_text(encoding="utf-8"))]


def missing_rows(path: Path) -> list[str]:
    """Rows of arms at equal tokens and at equal compute that the page beside a study.json does not have."""
    page = path.with_suffix(".md").read_text(encoding="utf-8").replace("−", "-")
    lines = format_study(json.loads(path.read_text(encoding="utf-8"))).split("\n## ")
    tables = [part for part in lines if part.startswith("At equal")]
    rows = [line for part in tables for line in part.splitlines() if line.startswith("| ")]
    assert len(tables) == 2 and len(rows) > 4
    return [row for row in rows if row not in page]


@pytest.mark.parametrize("path", studies(RESULTS) or [None], ids=lambda path: path.stem if path else "none")
def test_a_page_has_the_rows_that_its_study_gives(path: Path | None) -> None:
    if path is None:
        pytest.skip("no page of docs/results has its study.json beside it")
    assert missing_rows(path) == []


def test_a_row_that_is_not_the_studys_is_found(tmp_path: Path) -> None:
    """A small study.json, and pages of it: as it is made, and with a digit changed."""

    def point(arm: str, loss: float) -> dict:
        cost = {axis: [[10, 1.0], [40, 4.0]] for axis in ("flops", "seconds")}
        cost |= {f"selection_{axis}": [[10, 0.0], [40, 0.0]] for axis in ("flops", "seconds")}
        return {"seed": 1, "variant": "a", "arm": arm, "losses": {"near": [[10, 6.0], [40, loss]]}, "cost": cost}

    study = {"control": "a/random", "longer": {}, "seeds": [1], "guided": ["near"], "other": []}
    study["points"] = [point("random", 5.0), point("bliss", 4.875)]
    path = tmp_path / "small.json"
    path.write_text(json.dumps(study))
    (tmp_path / "headline.json").write_text("{}")
    assert studies(tmp_path) == [path]
    page = "Words.\n\n" + format_study(study) + table([["of", "its own"]])
    (tmp_path / "small.md").write_text(page)
    assert missing_rows(path) == []
    (tmp_path / "small.md").write_text(page.replace("4.875 (-0.125; 1/1)", "4.874 (-0.125; 1/1)", 1))
    assert missing_rows(path) == []  # it is still there in the other table
    (tmp_path / "small.md").write_text(page.replace("4.875", "4.874"))
    assert [row.split(" | ")[0] for row in missing_rows(path)] == ["| a/bliss", "| a/bliss"]
