"""What docs/extending.md says to write, put into a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_LINES = 40


def extended_copy(folder: Path, package: str, last: str) -> Path:
    """A copy of the package and its commands with the page's file for ``package`` (a folder of megatron_bliss).

    Its name goes behind the name ``last`` in the table in ``package/__init__.py``: these are all the lines touched.
    """
    for name in ("megatron_bliss", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pretrain_bliss.py", folder)
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^Write `(\S+)`:\n\n```python\n(.*?)```", page, re.MULTILINE | re.DOTALL))
    (path,) = [Path(path) for path in blocks if Path(path).parent == Path("megatron_bliss") / package]
    source, table = blocks[str(path)], folder / path.parent / "__init__.py"
    assert source.count("\n") < MOST_LINES
    names = table.read_text(encoding="utf-8")
    assert names.count(f'"{last}"') == 1
    table.write_text(names.replace(f'"{last}"', f'"{last}", "{path.stem}"'), encoding="utf-8")
    (folder / path).write_text(source, encoding="utf-8")
    return folder


def run_in(copy: Path, *command: str) -> subprocess.CompletedProcess:
    """``python COMMAND`` on the copy."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = inherited | {"PYTHONPATH": str(copy), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
