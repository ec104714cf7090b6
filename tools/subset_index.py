"""Write a subset of a corpus from scores: a new index over the same tokens, for stock Megatron-LM and for this package.

scores.npy holds one number per unit; scores.json beside it says which corpus they belong to.
"""

from __future__ import annotations

import argparse
import os
import sys

import numpy as np

from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.manifest import corpus_digest, read_manifest
from megatron_bliss.data.subset import read_provenance, write_subset
from megatron_bliss.files import read_json, sha256_file
from megatron_bliss.selection import POLICIES, domain_shares


def read_scores(path: str, prefix: str) -> np.ndarray:
    """Scores float[units] of exactly this corpus; ValueError when they belong to another one or were changed."""
    record_path = f"{path.removesuffix('.npy')}.json"
    record = read_json(record_path)
    digest = corpus_digest(prefix)
    if record.get("corpus_digest") != digest:
        raise ValueError(
            f"{record_path} is for a corpus with digest {str(record.get('corpus_digest'))[:12]}, but {prefix} has "
            f"{digest[:12]}: score this corpus, or give the one that was scored"
        )
    try:
        scores = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a usable .npy file ({error}); score the corpus again") from error
    if scores.shape != (len(IndexedCorpus(prefix)),):
        raise ValueError(f"{path} has shape {list(scores.shape)}, expected one score for each unit of {prefix}")
    return scores


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input-prefix", required=True, help="corpus or subset that was scored")
    add("--scores", required=True, help="scores.npy, with scores.json beside it")
    add("--output-folder", required=True, help="folder for the subset; its name is made from its content")
    add("--policy", choices=list(POLICIES), default="top_fraction", help="which units are kept")
    add("--fraction", type=float, help="top_fraction: share of units kept")
    add("--threshold", type=float, help="threshold: lowest score kept")
    add("--seed", type=int, default=0, help="draws among units of equal score")
    return parser.parse_args(arguments)


def policy_settings(options: argparse.Namespace) -> tuple[dict, str]:
    """Arguments of the policy, and a label for the name."""
    needed = {"top_fraction": "fraction", "threshold": "threshold"}[options.policy]
    value = getattr(options, needed)
    if value is None:
        raise ValueError(f"policy {options.policy} needs --{needed}")
    if options.policy == "top_fraction":
        return {"fraction": value, "seed": options.seed}, f"top{value * 100:g}"
    return {"threshold": value}, f"min{value:g}"


def run(options: argparse.Namespace) -> str:
    """Make the subset; returns its prefix."""
    scores = read_scores(options.scores, options.input_prefix)
    settings, label = policy_settings(options)
    ids = POLICIES[options.policy](scores, **settings)
    policy = {"name": options.policy, **settings}
    extra = {
        "lowest_score_kept": float(scores[ids].min()) if len(ids) else None,
        "scores_sha256": sha256_file(options.scores),
    }
    return write_subset(options.input_prefix, ids, options.output_folder, label=label, policy=policy, extra=extra)


def print_shares(parent: str, subset: str) -> None:
    """Share of units per domain in the parent and in the subset, where the corpus knows domains."""
    try:
        tables = [read_provenance(prefix, columns=["domain"]) for prefix in (parent, subset)]
    except ValueError:
        return  # a corpus without provenance has no domains to show
    pool, kept = (domain_shares(table) for table in tables)
    for name, share in pool.items():
        print(f"{name:<24}{share:>8.1%}{kept.get(name, 0.0):>8.1%}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    try:
        prefix = run(options)
    except (ValueError, OSError) as error:
        print(f"subset_index: {error}", file=sys.stderr)
        return 1
    counts = read_manifest(prefix)["counts"]
    print(f"{os.path.normpath(prefix)}: {counts['units']:,} units, {counts['tokens']:,} tokens")
    print_shares(options.input_prefix, prefix)
    return 0


if __name__ == "__main__":
    sys.exit(main())
