"""Take scores of a corpus from elsewhere: a column of a file becomes scores.npy and scores.json, as a run leaves them.

The file has one row per unit, in the corpus's order; or, with --id-columns, a row for every unit in any order, found by
the source file and line that the corpus's provenance has. tools/subset_index.py selects by the result.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np

from megatron_bliss.base.command import command
from megatron_bliss.base.files import atomic_file, read_json, sha256_file, write_json
from megatron_bliss.data.manifest import corpus_digest, read_manifest
from megatron_bliss.selection.score_files import check_belongs, read_matched_scores, read_scores_column


def parse_columns(text: str) -> tuple[str, str]:
    """``file,line`` as two names."""
    names = tuple(text.split(","))
    if len(names) != 2 or not all(names):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected two names of columns such as file,line")
    return names


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--corpus", required=True, help="corpus or subset that was scored")
    add("--scores", required=True, help=".npy, or .parquet, .csv, .jsonl (the last two also .gz and .zst)")
    add("--column", default="", help="column with the scores, higher is better; not needed where there is one only")
    add(
        "--id-columns",
        type=parse_columns,
        metavar="FILE,LINE",
        help="columns that hold source file and line of a row's unit (default: rows are in the corpus's order)",
    )
    add("--output", required=True, help="folder for scores.npy and scores.json")
    return parser.parse_args(arguments)


def import_scores(options: argparse.Namespace) -> np.ndarray:
    """Read the scores and write them; returns float32[units]."""
    prefix, path = options.corpus, options.scores
    digest = corpus_digest(prefix)
    if options.id_columns:
        scores = read_matched_scores(path, options.column, prefix, options.id_columns)
    else:
        check_belongs(path, prefix)
        scores = read_scores_column(path, options.column, read_manifest(prefix)["counts"]["units"], of=prefix)
    source = {"file": os.path.basename(path), "sha256": sha256_file(path)}
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "scores.json"
    found = {"corpus_digest": digest, "method": "import", "source": source, "column": options.column or None}
    found |= {"id_columns": options.id_columns}
    if record.is_file() and read_json(record) != found:
        raise ValueError(f"found other scores in {folder}, expected a new folder or the same scores: change --output")
    record.unlink(missing_ok=True)  # until its scores are there again
    with atomic_file(folder / "scores.npy") as stream:
        np.save(stream, scores, allow_pickle=False)
    write_json(record, found)
    return scores


@command("import_scores", (ValueError, OSError))
def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    scores = import_scores(options)
    low, middle, high = np.quantile(scores, (0, 0.5, 1))
    print(
        f"{os.path.normpath(options.output)}/scores.npy: {len(scores):,} scores from {low:g} to {high:g}, median "
        f"{middle:g}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
