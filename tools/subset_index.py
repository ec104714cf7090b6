"""Write a subset of a corpus from scores: a new index over the same tokens, for stock Megatron-LM and for this package.

scores.npy holds one number per unit; scores.json beside it says which corpus they belong to. Several score files can be
combined, and units of an exclude list or of another subset be kept out. --export also writes the chosen units as text.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_bliss.base.command import command
from megatron_bliss.base.files import read_json, sha256_file
from megatron_bliss.base.text import align
from megatron_bliss.config.selection import SelectionConfig
from megatron_bliss.config.settings import settings_of
from megatron_bliss.data.compare import shares_of
from megatron_bliss.data.manifest import corpus_digest, manifest_path, read_manifest
from megatron_bliss.data.subset import units_within, write_subset
from megatron_bliss.selection.combine import COMBINATIONS, check_combination, mean_score
from megatron_bliss.selection.command_line import add_policy_options, given_selection
from megatron_bliss.selection.export import TEXTS, Exported, check_export, export_units, plan_text
from megatron_bliss.selection.score_files import load_unit_scores
from megatron_bliss.selection.select import apply_policy, selection_lines


def read_scores(path: str, prefix: str) -> np.ndarray:
    """Scores float[units] of exactly this corpus; ValueError when they belong to another one or were changed."""
    record_path = f"{path.removesuffix('.npy')}.json"
    if not os.path.isfile(record_path):
        raise ValueError(
            f"found no {record_path}, expected it to say which corpus the scores are of: give the scores.npy of a run, "
            "or take the scores in with tools/import_scores.py"
        )
    digest, found = corpus_digest(prefix), read_json(record_path).get("corpus_digest")
    if found is None:
        raise ValueError(f"{record_path} names no corpus, expected its digest: give scores of a corpus")
    if found != digest:
        raise ValueError(
            f"{record_path} is for a corpus with digest {str(found)[:12]}, but {prefix} has "
            f"{digest[:12]}: score this corpus, or give the one that was scored"
        )
    return load_unit_scores(path, prefix)


def read_excluded(item: str, prefix: str) -> np.ndarray:
    """Unit numbers of ``prefix`` in a .npy or text file (one number a line), or those that another subset holds."""
    if os.path.exists(manifest_path(item)):
        return units_within(item, prefix)
    try:
        if item.endswith(".npy"):
            ids = np.load(item, allow_pickle=False)
        else:
            ids = np.array([int(word) for word in Path(item).read_text(encoding="utf-8").split()], dtype=np.int64)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{item} is no list of unit numbers ({error}): change --exclude") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"{item} holds {ids.dtype}{list(ids.shape)}, expected a list of unit numbers: change --exclude"
        )
    return ids


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input-prefix", required=True, help="corpus or subset that was scored")
    add("--scores", required=True, nargs="+", help="scores.npy, with scores.json beside it; several are combined")
    add("--output-folder", required=True, help="folder for the subset; its name is made from its content")
    add_policy_options(parser)
    near_duplicates = settings_of(SelectionConfig)["near_duplicates"].help
    add("--near-duplicates", "--max-similarity", type=float, default=0.0, metavar="SIMILARITY", help=near_duplicates)
    ways = "; ".join(f"{name}: {way.help}" for name, way in COMBINATIONS.items())
    add("--combine", choices=list(COMBINATIONS), help=f"what several score files come to. {ways}")
    weighted = ", ".join(name for name, way in COMBINATIONS.items() if way.weighted)
    add("--weights", type=float, nargs="+", help=f"{weighted}: one weight per score file (default: all the same)")
    add("--exclude", nargs="+", default=[], help="files of unit numbers (.npy or text), or prefixes of other subsets")
    add("--compact", action="store_true", help="write the chosen tokens to a .bin of their own, in order")
    add(
        "--export",
        metavar="FILE",
        help="write the chosen units also as rows with text, source, score and rank: .jsonl, .jsonl.gz, .jsonl.zst or "
        ".parquet",
    )
    add(
        "--export-text",
        choices=TEXTS,
        default="auto",
        help="text of these rows. source: of the source files; tokens: decoded; none: no text; auto: of the source "
        "files where units are documents and the files are as they were, else decoded",
    )
    add("--tokenizer-model", help="export: tokenizer file that decodes tokens, if it is not where the manifest says")
    add("--seed", type=int, default=0, help="of all that is drawn: units of equal score, and more by some policies")
    return parser.parse_args(arguments)


def selection_options(options: argparse.Namespace) -> SelectionConfig:
    """The section selection, from the command line."""
    selection = given_selection(options, options.near_duplicates)
    check_combination(options.combine, len(options.scores), options.weights)
    return selection


class Selected(NamedTuple):
    """What all score files together select."""

    ids: np.ndarray
    """int64[k], increasing."""
    policy: dict
    """For the manifest."""
    label: str
    scores: Callable[[], np.ndarray]
    """float[n]: one score per unit of all, for rows that are exported."""


def select(options: argparse.Namespace, selection: SelectionConfig) -> Selected:
    """Apply the policy to every score file, or to the score that they come to together."""
    prefix = options.input_prefix
    excluded = [read_excluded(item, prefix) for item in options.exclude]
    excluded = np.unique(np.concatenate(excluded)) if excluded else None
    scores = [read_scores(path, prefix) for path in options.scores]
    way = COMBINATIONS.get(options.combine)
    if way and way.scores:
        scores = [way.scores(scores, options.weights)]
    chosen = [apply_policy(prefix, one, selection, seed=options.seed, excluded=excluded) for one in scores]
    ids, policy, label = chosen[0]
    if way and way.selections:
        ids = way.selections([ids for ids, _, _ in chosen], len(scores[0]))
    if way:
        policy, label = (
            {"combine": options.combine, "parts": [policy for _, policy, _ in chosen]},
            f"{options.combine}-{label}",
        )
        policy |= {"weights": options.weights} if options.weights else {}
    if excluded is not None:
        policy |= {"excluded": len(excluded)}
    return Selected(ids, policy, label, lambda: mean_score(scores) if way and way.selections else scores[0])


def run(options: argparse.Namespace) -> tuple[str, Exported | None]:
    """Make the subset, and the export if there is one; returns the subset's prefix and what was exported."""
    selection = selection_options(options)
    if options.export:
        check_export(options.export, options.input_prefix)
    found = select(options, selection)
    if options.export and len(found.ids):  # what cannot be exported is told before anything is written
        plan_text(options.input_prefix, found.ids, options.export_text, tokenizer_model=options.tokenizer_model)
    extra = {
        "scores": [{"file": os.path.basename(path), "sha256": sha256_file(path)} for path in options.scores],
        "excluded": options.exclude,
    }
    prefix = write_subset(
        options.input_prefix,
        found.ids,
        options.output_folder,
        label=found.label,
        policy=found.policy,
        extra=extra,
        compact=options.compact,
    )
    return prefix, export(options, found) if options.export else None


def export(options: argparse.Namespace, found: Selected) -> Exported:
    """Write the chosen units as rows."""
    how = {"text": options.export_text, "tokenizer_model": options.tokenizer_model}
    return export_units(options.input_prefix, found.ids, found.scores(), options.export, **how)


def print_shares(parent: str, subset: str, field: str) -> None:
    """Share of units per domain in the parent and in the subset, where the corpus knows domains."""
    pool, kept = shares_of(parent, field), shares_of(subset, field)
    rows = [(name, f"{share:.1%}", f"{kept.get(name, 0.0):.1%}") for name, share in pool.items()]
    if rows:
        print(align(f"Share of units by {field}", [field, "pool", "kept"], rows))


@command("subset_index", (ValueError, OSError))
def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    prefix, exported = run(options)
    manifest = read_manifest(prefix)
    counts = manifest["counts"]
    print(f"{os.path.normpath(prefix)}: {counts['units']:,} units, {counts['tokens']:,} tokens")
    for line in selection_lines(manifest["policy"]):
        print(line)
    print_shares(options.input_prefix, prefix, options.domain_field or "domain")
    if exported:
        print(f"{exported.path}: {exported.rows:,} rows, {exported.why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
