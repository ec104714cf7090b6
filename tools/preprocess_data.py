"""Turn text into a Megatron corpus: X.bin, X.idx, X.manifest.json, X.provenance.parquet, X.rejected.jsonl.

A run that was stopped goes on when the same command is given again, and gives the same bytes; what it has done so far
waits in X.pieces/. On an array of nodes, node i of n runs the same command with --shard i/n, which makes the corpus
X.shard_i_of_n; then --merge-shards n joins them into X, byte for byte what one run makes (X.pieces/ of a shard must
not be shared by two nodes). tools/merge_index.py makes one logical corpus of the shards without copying them.

A document is a JSON line, a row of a parquet file, or a line of a .txt file.
"""

from __future__ import annotations

import argparse
import sys

from megatron_bliss.base.command import command
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.ingest.shards import merge_shards, parse_shard
from megatron_bliss.data.tokenizers import KINDS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; names are Megatron-LM's where it has the option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        help="files, folders or globs of .jsonl, .json, .txt (plain, .gz or .zst) and .parquet, in this order, "
        "sorted within a folder or glob",
    )
    add("--output-prefix", required=True, help="path of the corpus, without a suffix")
    add("--json-keys", nargs="+", default=["text"], help="keys that hold the text; several are joined by a newline")
    add("--tokenizer-type", default="huggingface", choices=list(KINDS), help="what kind of file --tokenizer-model is")
    add("--tokenizer-model", help="tokenizer.json (or its folder) or a SentencePiece .model")
    add("--eod-token", help="token that ends a document, if it is not one of the usual ones")
    add("--append-eod", action="store_true", help="end every document with EOD (windows always do)")
    add("--unit", choices=["document", "window"], default="document", help="what one entry of the index is")
    add("--window-length", type=int, default=1024, help="tokens per window")
    add("--workers", type=int, default=1, help="tokenising processes; the result does not depend on it")
    add(
        "--tokenizer-backend",
        choices=["auto", "own"],
        default="auto",
        help="auto: GigaToken where it gives the tokenizer's own answer, which is checked on samples; own: the "
        "tokenizer's own library; the result does not depend on it",
    )
    add("--shard", type=parse_shard, help="i/n, from 1/n to n/n: make the i-th of n shards, of whole files")
    add("--merge-shards", type=int, metavar="N", help="join the N finished shards; needs no --input")
    add(
        "--max-bad-fraction", type=float, default=0.01, help="share of lines that may be set aside before the run fails"
    )
    add(
        "--provenance",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write X.provenance.parquet: file, line, url, domain, format and label of every unit",
    )
    add(
        "--piece-megabytes",
        type=float,
        default=64,
        help="text between two commits, which is what a worker can lose when it is killed",
    )
    add(
        "--progress",
        choices=["auto", "none", "json"],
        default="auto",
        help="show MB/s of text, documents/s, tokens/s and the time left; json: as JSON lines; on standard error",
    )
    options = parser.parse_args(arguments)
    if not options.merge_shards and not options.input:
        parser.error("the following arguments are required: --input")
    return options


def make(options: argparse.Namespace) -> dict:
    """Run what was asked for; returns the manifest."""
    if options.merge_shards:
        return merge_shards(options.output_prefix, options.merge_shards)
    values = {**vars(options), "inputs": options.input}
    progress = values.pop("progress")
    del values["input"], values["merge_shards"]
    return preprocess(PreprocessSettings(**values), progress=progress)


@command("preprocess_data", (ValueError, OSError, RuntimeError))
def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    manifest = make(options)
    counts = ", ".join(f"{value:,} {name}" for name, value in manifest["counts"].items())
    print(f"{options.output_prefix}: {counts}; {manifest['bin_bytes']:,} bytes of tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
