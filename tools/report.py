"""Write report.html for a run folder, finished or not: python tools/report.py RUN_FOLDER"""

import argparse
import sys

from megatron_bliss.report.page import write_report


def main() -> int:
    parser = argparse.ArgumentParser(description="Write report.html for a run folder, finished or not.")
    parser.add_argument("run_folder", help="folder that pretrain_bliss.py writes (its option run_folder)")
    arguments = parser.parse_args()
    try:
        print(write_report(arguments.run_folder))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
