"""Turn JSON lines into a Megatron corpus: X.bin, X.idx, X.manifest.json, X.provenance.parquet, X.rejected.jsonl."""

from __future__ import annotations

import argparse
import sys

from megatron_bliss.data.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.tokenizers import KINDS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; names are Megatron-LM's where it has the option."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files, folders or globs of .jsonl, .json, .jsonl.gz, .json.gz")
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
        "--max-bad-fraction", type=float, default=0.01, help="share of lines that may be set aside before the run fails"
    )
    add("--progress", choices=["auto", "none"], default="auto", help="show how far it has come")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = vars(parse_arguments(arguments))
    show_progress = options.pop("progress") == "auto"
    options["inputs"] = options.pop("input")
    try:
        manifest = preprocess(PreprocessSettings(**options), show_progress=show_progress)
    except (ValueError, FileNotFoundError) as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return 1
    counts = ", ".join(f"{value:,} {name}" for name, value in manifest["counts"].items())
    print(f"{options['output_prefix']}: {counts}; {manifest['bin_bytes']:,} bytes of tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
