"""Results of several runs, checkpoints and models side by side, as one Markdown table.

python tools/compare.py runs/a runs/b                         the last round of every arm
python tools/compare.py --every-round runs/a
python tools/compare.py pythia=evaluated/results.json runs/a  a label before the path
"""

from __future__ import annotations

import argparse
import sys

from megatron_bliss.base.command import command
from megatron_bliss.base.files import atomic_file, write_json
from megatron_bliss.evaluation.results import find_results, markdown


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("results", nargs="+", metavar="[LABEL=]PATH", help="run folders, results.json or their folders")
    parser.add_argument("--every-round", action="store_true", help="of run folders, the warm-up and every round")
    parser.add_argument("--output", help="file for the table instead of the terminal; .json: the results themselves")
    return parser.parse_args(arguments)


def collect(places: list[str], every_round: bool) -> dict[str, dict]:
    """{label: result} of all places; ValueError where two have one label."""
    rows: dict[str, dict] = {}
    for place in places:
        label, found_label, path = place.partition("=")
        found = find_results(path if found_label else place, every_round=every_round)
        if found_label:
            found = {_labelled(label, name, len(found)): result for name, result in found.items()}
        repeated = rows.keys() & found.keys()
        if repeated:
            raise ValueError(f"found {min(repeated)!r} twice, expected different labels: write LABEL={place}")
        rows |= found
    return rows


def _labelled(label: str, name: str, count: int) -> str:
    """A label stands for a single row, and before the arm and round where a run has several."""
    return label if count == 1 else f"{label}: {name.split(': ', 1)[-1]}"


@command("compare", (ValueError, OSError))
def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    rows = collect(options.results, options.every_round)
    if not options.output:
        print(markdown(rows), end="")
    elif options.output.endswith(".json"):
        write_json(options.output, rows)
    else:
        with atomic_file(options.output, "w") as file:
            file.write(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
