"""Measure the parts of this package against named peers: benchmark.py COMMAND [options].

Prints a table, or with --json one JSON object; --output also writes the table to a Markdown file with date and machine.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, this file's folder alone is on the path

from megatron_bliss.base.command import command  # noqa: E402
from megatron_bliss.base.files import atomic_file  # noqa: E402
from tools.benchmarks import bilevel, data, evaluation, memory, pretrain, score, table  # noqa: E402

COMMANDS = {
    "bilevel": (bilevel, table.markdown),
    "memory": (memory, memory.markdown),
    "evaluation": (evaluation, evaluation.markdown),
    "pretrain": (pretrain, pretrain.markdown),
    "data": (data, data.markdown),
    "score": (score, score.markdown),
}
"""Command -> module with ``add_arguments`` and ``run``, and the function that writes its result as Markdown."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, _) in COMMANDS.items():
        command = commands.add_parser(
            name, description=module.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
        command.add_argument("--output", help="also write the table to this Markdown file")
    return parser.parse_args(arguments)


@command("benchmark", (ValueError, OSError))
def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    module, markdown = COMMANDS[options.command]
    result = module.run(options)
    if result is None:
        return 0
    words = ["python", "tools/benchmark.py", *(sys.argv[1:] if arguments is None else arguments)]
    page = markdown(result, shlex.join(words))
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(options.output, "w") as stream:
            stream.write(page)
    print(json.dumps(result, indent=2) if options.json else page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
