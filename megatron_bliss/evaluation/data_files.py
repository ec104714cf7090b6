"""The local files that tasks are read from: ``NAME.SPLIT.jsonl`` or ``.jsonl.gz`` in one folder, checked when read.

Ten names are lm-eval's own tasks; a user's own are found by their files, ``NAME.last_word.jsonl`` and
``NAME.choice.jsonl``.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import orjson

from megatron_bliss.evaluation.checksums import KNOWN, Expected, check, digest, record
from megatron_bliss.evaluation.rows import READERS, USER_READERS, Row

STEMS = {
    "sciq": "sciq.test",
    "arc_easy": "arc_easy.test",
    "arc_challenge": "arc_challenge.test",
    "logiqa": "logiqa.test",
    "openbookqa": "openbookqa.test",
    "boolq": "boolq.validation",
    "hellaswag": "hellaswag.validation",
    "piqa": "piqa.validation",
    "winogrande": "winogrande_xl.validation",
    "lambada_openai": "lambada_openai.test",
}
"""Task -> its file's name without ending: the split that lm-eval scores."""
TASK_NAMES = tuple(STEMS)
ENDINGS = (".jsonl", ".jsonl.gz")


class TaskData(NamedTuple):
    """A task's rows as its definition reads them. ``kind`` is the task's name, or that of a user's task."""

    kind: str
    file: Path
    rows: list[Row]
    sha256: str
    known: bool


def read_task(name: str, data_dir: Path | str, *, allow_unknown: bool = False) -> TaskData:
    """Read and check the data of a task.

    Raises FileNotFoundError where the file is missing and ValueError where it is damaged or, unless ``allow_unknown``,
    not what is expected; both say what was expected.
    """
    file, rows = read_rows(name, data_dir)
    found = Expected(len(rows), digest(rows))
    known = check(name, file, found, data_dir, allow_unknown=allow_unknown)
    return TaskData(_kind(name, file), file, rows, found.sha256, known)


def write_checksums(data_dir: Path | str, tasks: Sequence[str]) -> Path:
    """Record what the data files of these tasks hold now, keeping what is recorded of others; returns the file.

    An evaluation refuses a recorded file whose content is another one.
    """
    found = [read_rows(task, data_dir) for task in tasks]
    return record(data_dir, {file.name: Expected(len(rows), digest(rows)) for file, rows in found})


def read_rows(name: str, data_dir: Path | str) -> tuple[Path, list[Row]]:
    """The file of a task and its rows, not yet held against any checksum."""
    file = find_file(name, data_dir)
    reader = READERS.get(name) or USER_READERS[_kind(name, file)]
    rows = [_read(reader, line, f"{file}, line {number}") for number, line in _lines(file)]
    if not rows:
        raise ValueError(f"{file} holds no rows, expected {_expected(name)}: put the right file there")
    return file, rows


def find_tasks(data_dir: Path | str) -> list[str]:
    """Names of all tasks that have a file in the folder: lm-eval's in their usual order, then the user's by name."""
    names = [name for name, stem in STEMS.items() if _existing(data_dir, [stem])]
    own = set()
    for path in Path(data_dir).glob("*.jsonl*"):
        match = re.fullmatch(rf"(.+)\.({'|'.join(USER_READERS)})\.jsonl(\.gz)?", path.name)
        if match and match[1] not in STEMS:
            own.add(match[1])
    return names + sorted(own)


def find_file(name: str, data_dir: Path | str) -> Path:
    """The one file of a task; FileNotFoundError that says what was expected, ValueError where there are several."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"found task name {name!r}, expected letters, digits, '_', '-' and '.': change it")
    stems = [STEMS[name]] if name in STEMS else [f"{name}.{kind}" for kind in USER_READERS]
    files = _existing(data_dir, stems)
    if not files:
        wanted = " or ".join(stem + ending for stem in stems for ending in ENDINGS)
        others = f"; tasks found there: {', '.join(find_tasks(data_dir)) or 'none'}"
        raise FileNotFoundError(
            f"found no data file of task {name} in {data_dir}, expected {wanted} ({_expected(name)}){others}: make it "
            "with tools/prepare_evaluation.py, or change evaluation.data_dir or evaluation.tasks"
        )
    if len(files) > 1:
        raise ValueError(
            f"found {' and '.join(str(file) for file in files)}, expected one file for task {name}: remove the others"
        )
    return files[0]


def _existing(data_dir: Path | str, stems: list[str]) -> list[Path]:
    paths = [Path(data_dir) / (stem + ending) for stem in stems for ending in ENDINGS]
    return [path for path in paths if path.is_file()]


def _kind(name: str, file: Path) -> str:
    return name if name in STEMS else file.name.removeprefix(f"{name}.").split(".")[0]


def _expected(name: str) -> str:
    if name in KNOWN:
        return f"{KNOWN[name].rows} rows, content digest {KNOWN[name].sha256}"
    return "one JSON object a line; for a name that is none of lm-eval's tasks " + ", ".join(TASK_NAMES)


def _lines(file: Path):
    """Numbered lines that are not empty; ValueError for a damaged archive."""
    opened = gzip.open if file.name.endswith(".gz") else open
    try:
        with opened(file, "rb") as stream:
            yield from ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{file} is damaged ({error}), expected a whole gzip file: put the right file there"
        ) from error


def _read(reader, line: bytes, place: str) -> Row:
    try:
        row = orjson.loads(line)
        if not isinstance(row, dict):
            raise TypeError(f"found a {type(row).__name__}, expected an object")
        return reader(row)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"found no field {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{place}: {problem}; expected: {reader.__doc__.splitlines()[0]}") from error
