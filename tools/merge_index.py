"""Merge corpora and subsets into one logical corpus with an index, manifest and provenance of its own.

Subsets of one corpus are merged without copying anything; corpora with different .bin files are written one after the
other into a new one, which is what the format has room for. To train on several without copying them, give all prefixes
to Megatron-LM's --data-path.
"""

from __future__ import annotations

import argparse
import sys

from megatron_bliss.base.command import command
from megatron_bliss.data.manifest import read_manifest
from megatron_bliss.data.merge import merge_corpora


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input-prefixes", nargs="+", required=True, help="corpora and subsets, in the order of the result")
    add("--output-folder", required=True, help="folder for the result; its name is made from its content")
    add("--label", default="merged", help="first word of the result's name")
    add("--drop-repeated", action="store_true", help="take units that several subsets hold once, instead of refusing")
    return parser.parse_args(arguments)


@command("merge_index", (ValueError, OSError))
def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    prefix = merge_corpora(
        options.input_prefixes, options.output_folder, label=options.label, drop_repeated=options.drop_repeated
    )
    manifest = read_manifest(prefix)
    counts = manifest["counts"]
    copied = "nothing copied" if manifest["kind"] == "subset" else f"{manifest['bin_bytes']:,} bytes copied"
    print(f"{prefix}: {counts['units']:,} units, {counts['tokens']:,} tokens, {copied}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
