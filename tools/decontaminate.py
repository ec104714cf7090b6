"""List or drop units of a corpus, or raw documents, that share n-grams of words with evaluation files.

Case, punctuation and line breaks make no difference. Writes contaminated.jsonl, contaminated.npy (of a corpus: for
subset_index.py --exclude) and decontamination.json; with --drop also a subset, or clean.jsonl.gz, of all the others.
"""

from __future__ import annotations

import argparse
import os
import sys

from megatron_bliss.base.command import command
from megatron_bliss.base.text import align
from megatron_bliss.data.decontamination import DecontaminationSettings, decontaminate


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--corpus", metavar="PREFIX", help="corpus or subset, path without .bin/.idx")
    where.add_argument(
        "--input",
        nargs="+",
        default=[],
        help="files, folders or globs of raw text: .jsonl .json .txt, plain, .gz or .zst, and .parquet",
    )
    add(
        "--evaluation",
        nargs="+",
        action="extend",
        required=True,
        help="files, folders or globs of the same kinds that must not be in the training data",
    )
    add("--output", required=True, metavar="FOLDER", help="folder for the result")
    add("--ngram", type=int, default=13, help="words of an n-gram")
    add(
        "--shortest",
        type=int,
        help="an evaluation text of fewer words than --ngram is looked for as a whole if it has at least so many, "
        "and left out otherwise; default: 8, or --ngram if that is less",
    )
    add(
        "--json-keys",
        nargs="+",
        default=[],
        help="keys of evaluation records, at any depth, whose strings count; default: all strings",
    )
    add("--input-keys", nargs="+", default=["text"], help="--input: keys that hold the text, as in preprocessing")
    add("--drop", action="store_true", help="also write what is left: a subset, or clean.jsonl.gz")
    add("--tokenizer-model", help="--corpus: tokenizer file, if it is not where the manifest says")
    return parser.parse_args(arguments)


def print_result(record: dict, folder: str) -> None:
    """The table of evaluation files, the share of units that are hit, and what was written."""
    files = [one["file"] for one in record["evaluation"]]
    names = [os.path.basename(file) for file in files]
    names = names if len(set(names)) == len(names) else files
    columns = ("records", "records_left_out", "ngrams", "units_hit")
    rows = [
        (name, *(f"{one[column]:,}" for column in columns))
        for name, one in zip(names, record["evaluation"], strict=True)
    ]
    size = record["settings"]["ngram"]
    print(align(f"Shared {size}-grams", ["evaluation file", "records", "too short", "n-grams", "units hit"], rows))
    counts = record["counts"]
    print(f"{counts['units_hit']:,} of {counts['units']:,} units hit ({counts['share_hit']:.2%})")
    if counts.get("rejected"):
        file, line, reason = (record["first_rejects"][0][name] for name in ("file", "line", "reason"))
        print(f"{counts['rejected']:,} lines left out; the first: {file}, line {line}: {reason}")
    for name, value in (("subset", record.get("subset")), ("clean", record.get("clean", {}).get("file"))):
        if value:
            print(f"{name}: {os.path.normpath(os.path.join(folder, value))}")


@command("decontaminate", (ValueError, OSError))
def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = vars(parse_arguments(arguments))
    options["inputs"] = options.pop("input")
    print_result(decontaminate(DecontaminationSettings(**options), show_progress=True), options["output"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
