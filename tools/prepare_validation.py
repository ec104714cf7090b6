"""Turn passages (LAMBADA) or any text in JSON lines into a validation set: V.bin, .idx, .labels.npy, .manifest.json."""

from __future__ import annotations

import argparse
import sys

from megatron_bliss.data.tokenizers import KINDS
from megatron_bliss.data.validation import ValidationSettings, parse_split, prepare_validation


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; the tokenizer must be the training corpus's."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files, folders or globs of .jsonl, .json, .jsonl.gz, .json.gz")
    add("--output-prefix", required=True, help="path of the validation set, without a suffix")
    add("--json-keys", nargs="+", default=["text"], help="keys that hold the text; several are joined by a newline")
    add("--tokenizer-type", default="huggingface", choices=list(KINDS), help="what kind of file --tokenizer-model is")
    add("--tokenizer-model", help="tokenizer.json (or its folder) or a SentencePiece .model")
    add("--eod-token", help="token that ends a document, if it is not one of the usual ones")
    add("--label", choices=["last-word", "all"], default="last-word", help="tokens by which a text is judged")
    add("--max-length", type=int, default=1024, help="tokens per unit: passages lose their beginning, texts are cut up")
    add("--split", default="1/1", metavar="I/N", help="take every N-th line beginning with the I-th, e.g. 1/2 and 2/2")
    add(
        "--max-bad-fraction", type=float, default=0.01, help="share of lines that may be set aside before the run fails"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = vars(parse_arguments(arguments))
    options["inputs"] = options.pop("input")
    try:
        options["split"] = parse_split(options["split"])
        manifest = prepare_validation(ValidationSettings(**options))
    except (ValueError, FileNotFoundError) as error:
        print(f"prepare_validation: {error}", file=sys.stderr)
        return 1
    print(
        f"{options['output_prefix']}: " + ", ".join(f"{value:,} {name}" for name, value in manifest["counts"].items())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
