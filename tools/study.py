#!/usr/bin/env python3
"""Compare arms under several sets of options over paired seeds: runs, tables, and a plot of gain against price.

study.py examples/studies/arms_small/study.yaml --output runs/arms_small [--seeds 1 2 3] [--only dsir bliss] [--plan]

Running the same command again continues: finished runs are not run again, an unfinished one goes on. Writes study.md,
study.json, headline.json and pareto.png into the folder, from the runs in runs/seed_N/VARIANT.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_bliss.base.command import command
from megatron_bliss.study.description import KEYS, read_study

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help=f"YAML file with {', '.join(KEYS)}")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs and for what they come to")
    parser.add_argument("--seeds", type=int, nargs="+", help="these instead of the file's")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="of the arms, these and the control")
    parser.add_argument("--plan", action="store_true", help="print runs, FLOPs and estimated times, and run none")
    parser.add_argument("--max-hours", type=float, metavar="H", help="refuse a study that takes longer from now on")
    parser.add_argument("--in-parts", action="store_true", help="with --max-hours: make the runs that fit, then stop")
    options = parser.parse_args(arguments)
    if options.max_hours is not None and not options.max_hours > 0:
        parser.error(f"found --max-hours {options.max_hours}, expected hours above 0")
    if options.in_parts and options.max_hours is None:
        parser.error("found --in-parts without --max-hours, expected both: say how many hours there are")
    return options


@command("study", (ValueError, OSError))
def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, and print the tables; returns the exit status."""
    options = parse_arguments(arguments)
    study = read_study(options.study, options.seeds)

    from megatron_bliss.study.whole import Limits, run_study  # after reading: importing torch takes seconds

    limits = Limits(options.only, options.max_hours, options.in_parts, options.plan)
    print(run_study(study, options.output, ROOT / "pretrain_bliss.py", limits))
    return 0


if __name__ == "__main__":
    sys.exit(main())
