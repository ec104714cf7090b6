"""Write report.html for a run folder, finished or not: python tools/report.py RUN_FOLDER"""

import argparse
import sys

from megatron_bliss.base.command import command
from megatron_bliss.report.page import write_report


@command("error")
def main() -> int:
    """Write the page and print its path; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write report.html for a run folder, finished or not.")
    parser.add_argument("run_folder", help="folder that pretrain_bliss.py writes (its option run_folder)")
    arguments = parser.parse_args()
    print(write_report(arguments.run_folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
