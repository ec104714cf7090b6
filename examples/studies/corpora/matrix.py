"""The transfer matrix of examples/studies/corpora: what a scorer of one corpus gives on another.

matrix.py runs/corpora
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_bliss.base.files import read_json
from megatron_bliss.study.paired import results
from megatron_bliss.study.table import format_spread

CORPORA = ("weborganizer", "c4", "openwebtext", "stackexchange")
ARMS = ("own/random", "own/dsir", "own/bliss", *(f"from_{name}/external" for name in CORPORA))


def matrix(folder: Path, side: str) -> str:
    """A Markdown table: a row for each arm, a column for each corpus; differences to random at equal tokens."""
    found = {name: results(read_json(folder / name / "study.json"))["equal tokens"] for name in CORPORA}
    lines = [["scorer", *CORPORA], ["---"] * (len(CORPORA) + 1)]
    for arm in ARMS:
        cells = []
        for name in CORPORA:
            one = found[name][arm][side]
            cells.append(format_spread(one.value) if arm == ARMS[0] else format_spread(one.difference, sign="+"))
        lines.append([arm.removesuffix("/external"), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    """Print both sides; returns the exit status."""
    folder = Path(sys.argv[1])
    print("# Held-out text of the guide's kind\n\n" + matrix(folder, "guided"))
    print("\n# Held-out text of the corpus that was chosen from\n\n" + matrix(folder, "other"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
