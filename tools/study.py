#!/usr/bin/env python3
"""Compare arms under several sets of options over paired seeds: runs, tables, and a plot of gain against price.

study.py examples/studies/arms_small/study.yaml --output runs/arms_small [--seeds 1 2 3] [--only dsir bliss] [--plan]

Running the same command again continues: finished runs are not run again, an unfinished one goes on. Writes study.md,
study.html, study.json, headline.json and plots into the folder, from the runs in runs/seed_N/VARIANT. With --from it
makes the pages of a study.json that lies anywhere.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import NoReturn

from megatron_bliss.base.command import command
from megatron_bliss.study.description import KEYS, read_study

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", help=f"YAML file with {', '.join(KEYS)}")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs and for what they come to")
    parser.add_argument("--seeds", type=int, nargs="+", help="these instead of the file's")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="of the arms, these and the control")
    parser.add_argument("--from", dest="given", type=Path, metavar="STUDY.json", help="make its page and run nothing")
    parser.add_argument("--plan", action="store_true", help="print runs, FLOPs and estimated times, and run none")
    parser.add_argument("--max-hours", type=float, metavar="H", help="refuse a study that takes longer from now on")
    parser.add_argument("--in-parts", action="store_true", help="with --max-hours: make the runs that fit, then stop")
    options = parser.parse_args(arguments)
    if (options.study is None) == (options.given is None):
        parser.error("expected a study's YAML file, or --from with a study.json: give one of them")
    if options.given and (options.plan or options.max_hours or options.seeds or options.only):
        parser.error("found options of runs with --from, expected none: it runs nothing")
    if options.max_hours is not None and not options.max_hours > 0:
        parser.error(f"found --max-hours {options.max_hours}, expected hours above 0")
    if options.in_parts and options.max_hours is None:
        parser.error("found --in-parts without --max-hours, expected both: say how many hours there are")
    return options


def _end(number: int, frame: object) -> NoReturn:
    """Unwind, so that the runs that were started end with the study."""
    sys.exit(128 + number)


@command("study", (ValueError, OSError))
def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, and print the tables; returns the exit status."""
    options = parse_arguments(arguments)
    study = read_study(options.study, options.seeds) if options.study else None

    from megatron_bliss.study.whole import Limits, remake_page, run_study  # after reading: torch takes seconds

    if study is None:
        print(remake_page(options.given, options.output))
        return 0
    signal.signal(signal.SIGTERM, _end)
    limits = Limits(options.only, options.max_hours, options.in_parts, options.plan)
    print(run_study(study, options.output, ROOT / "pretrain_bliss.py", limits))
    return 0


if __name__ == "__main__":
    sys.exit(main())
