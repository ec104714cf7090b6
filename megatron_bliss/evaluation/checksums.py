"""What the tasks' data files should hold: counts of rows and digests that do not depend on spelling or order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import orjson

from megatron_bliss.base.files import read_json, write_json
from megatron_bliss.evaluation.rows import Row, digested

CHECKSUMS_FILE = "checksums.json"
"""In the data folder: {"format": 1, "files": {name: {"rows", "sha256"}}}, written by whoever made the files there."""


class Expected(NamedTuple):
    """Rows of a file and the :func:`digest` of their content."""

    rows: int
    sha256: str


KNOWN: dict[str, Expected] = {
    "sciq": Expected(1000, "dd60a2ecf971f1af8918cc9a142d6434c00fbf24f831a20ffa32d3e412947dd8"),
    "arc_easy": Expected(2376, "e23c5a897b01260c0726a1b3549fc810107b90985043929186f7fc0d9e96febf"),
    "arc_challenge": Expected(1172, "a347626da49c30a1f2325f74fdc4e201cc90fa144c3cbb20c96b930aef4c915e"),
    "logiqa": Expected(651, "c8ba66140e6e819971dc938effb0c36769ecef2ef5179f405b86a00bce27ad4e"),
    "openbookqa": Expected(500, "810b8583c864668f970b0198a18a6b192636229b58ec2c5514fc189b3e2dd27f"),
    "boolq": Expected(3270, "aa90296a818231ad5c38813ce917f46d9c4a6a081811e5cd94154caa1754fc57"),
    "hellaswag": Expected(10042, "6f34cffa3a59fd44d18fdeb7255abde4750e5518e6bba377435dc20f4a5c5b13"),
    "piqa": Expected(1838, "f7b4bcd7e924ba674a93be64ee169342f7a066cbf1f472879da97d1cd801b421"),
    "winogrande": Expected(1267, "8211a218d0ab2b4bdcf87d2ecb264a9cf48ed1c1a497990db435fc4a8901a2fb"),
    "lambada_openai": Expected(5153, "7ce30a956cab885360c1e66ab1ebc3c6bce65f95007e602d2348883a3490a8d0"),
}
"""The split that lm-eval scores, as a public copy has it that this version was checked with."""


def digest(rows: Iterable[Row]) -> str:
    """SHA-256 over the rows as the tasks read them, sorted: the same for .jsonl and .jsonl.gz, in any order."""
    lines = sorted(orjson.dumps(digested(row), option=orjson.OPT_SORT_KEYS) for row in rows)
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def record(data_dir: Path | str, files: Mapping[str, Expected]) -> Path:
    """Record what these files of the folder hold, keeping what is recorded of others; returns ``checksums.json``."""
    path = Path(data_dir) / CHECKSUMS_FILE
    known = {**recorded(data_dir), **files}
    write_json(path, {"format": 1, "files": {name: known[name]._asdict() for name in sorted(known)}})
    return path


def recorded(data_dir: Path | str) -> dict[str, Expected]:
    """File name -> what ``checksums.json`` says of it; empty where there is no such file."""
    path = Path(data_dir) / CHECKSUMS_FILE
    if not path.exists():
        return {}
    try:
        files = read_json(path)["files"]
        return {name: Expected(int(entry["rows"]), str(entry["sha256"])) for name, entry in files.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not hold files with rows and sha256 ({error!r}): remove it, or make the data files again"
        ) from error


def check(task: str, file: Path, found: Expected, data_dir: Path | str, *, allow_unknown: bool) -> bool:
    """Whether the file is the known set of its task.

    ValueError where it differs from what the folder records, or where it is neither known nor recorded and the task has
    a known set, unless ``allow_unknown``.
    """
    known = KNOWN.get(task)
    own = recorded(data_dir).get(file.name)
    if own is not None and own != found:
        raise ValueError(
            _differs(file, found, own, f"{CHECKSUMS_FILE} beside it", "remove its entry if the change was meant")
        )
    if known is None or own is not None or found == known or allow_unknown:
        return found == known
    remedy = "record this copy with tools/prepare_evaluation.py, or set evaluation.allow_unknown_data=true"
    raise ValueError(_differs(file, found, known, f"the known set of {task}", remedy))


def _differs(file: Path, found: Expected, expected: Expected, source: str, remedy: str) -> str:
    return (
        f"{file} holds {found.rows} rows with digest {found.sha256}, expected {expected.rows} rows with digest "
        f"{expected.sha256} as in {source}: put the right file there, or {remedy}"
    )
