"""Turn passages (LAMBADA), items of tasks, or any text in JSON lines into a validation set with labels.

Writes V.bin, V.idx, V.labels.npy and V.manifest.json. Several inputs make a mixture, all of each or by weights:
  --input lambada.jsonl sciq.jsonl web.jsonl --label last-word answer all --weights 0.5 0.3 0.2 --weight-by labels
"""

from __future__ import annotations

import argparse
import sys

from megatron_bliss.base.command import command
from megatron_bliss.data.tokenizers import KINDS
from megatron_bliss.data.validation import LABELS, ValidationSettings, parse_split, prepare_validation


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; the tokenizer must be the training corpus's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        help="files, folders or globs of JSON lines, compressed or not; each is one part of a mixture",
    )
    add("--output-prefix", required=True, help="path of the validation set, without a suffix")
    add("--json-keys", nargs="+", default=["text"], help="keys that hold the text; several are joined by a newline")
    add("--tokenizer-type", default="huggingface", choices=list(KINDS), help="what kind of file --tokenizer-model is")
    add("--tokenizer-model", help="tokenizer.json (or its folder) or a SentencePiece .model")
    add("--eod-token", help="token that ends a document, if it is not one of the usual ones")
    add(
        "--label",
        nargs="+",
        choices=LABELS,
        default=["last-word"],
        help="tokens by which a text is judged: its last word, the right answer of a task's item, the whole item with "
        "its right answer, or all; one for all inputs or one each",
    )
    add("--weights", type=float, nargs="+", help="share of each input in the set; default: all of every input")
    add("--weight-by", choices=["units", "labels"], default="units", help="what shares count: units or labelled tokens")
    add("--seed", type=int, default=0, help="with --weights: which units are taken")
    add("--max-length", type=int, default=1024, help="tokens per unit: passages lose their beginning, texts are cut up")
    add("--split", default="1/1", metavar="I/N", help="take every N-th line beginning with the I-th, e.g. 1/2 and 2/2")
    add(
        "--max-bad-fraction", type=float, default=0.01, help="share of lines that may be set aside before the run fails"
    )
    return parser.parse_args(arguments)


@command("prepare_validation", (ValueError, FileNotFoundError))
def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = vars(parse_arguments(arguments))
    options["inputs"] = options.pop("input")
    options["split"] = parse_split(options["split"])
    manifest = prepare_validation(ValidationSettings(**options))
    print(
        f"{options['output_prefix']}: " + ", ".join(f"{value:,} {name}" for name, value in manifest["counts"].items())
    )
    if len(options["inputs"]) > 1:
        for one in manifest["inputs"]:
            print(f"  {one['units']:>9,} units {one['labelled']:>11,} labelled  {one['label']:<9}  {one['input']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
