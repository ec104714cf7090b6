"""A small study on the corpus of tests/runs.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from tests.runs import ROOT, environment

OPTIONS = {"rounds": 1, "evaluation.tasks": [], "pretraining.train_iters": 8, "proxy.warmup_iters": 3}
"""What the tests' runs have otherwise than tests/runs.py."""
VARIANTS = {"hard": {}, "soft": {"selection.policy": "gumbel", "selection.temperature": 0.5}}


def write_study(folder: Path, corpus: Path, **keys: object) -> Path:
    """A study of two variants, two arms and two seeds on ``corpus``; ``keys`` stand over its own."""
    content = {
        "seeds": [1, 2],
        "arms": ["random", "dsir"],
        "base": {"config": str(corpus / "config.yaml"), **OPTIONS},
        "variants": VARIANTS,
        **keys,
    }
    if not keys.keys() & {"arms", "variants"}:  # others may not have these
        content["agreement"] = ["hard/dsir", "soft/dsir", "hard/random"]
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def tool_command(study: Path | None, output: Path, *options: str) -> list[str]:
    given = [] if study is None else [str(study)]
    return [sys.executable, str(ROOT / "tools/study.py"), *given, "--output", str(output), *options]


def run_tool(study: Path | None, output: Path, *options: str) -> subprocess.CompletedProcess:
    command = tool_command(study, output, *options)
    return subprocess.run(command, env=environment(), capture_output=True, text=True)
