"""Make the data files of evaluation tasks: lm-eval's from a Hugging Face cache, or your own from held-out text.

  python tools/prepare_evaluation.py --from-huggingface-cache --output eval-data [--tasks sciq piqa]
  python tools/prepare_evaluation.py --from-text 'held_out/*.jsonl.gz' --output eval-data --name mine --kind both

Nothing is fetched from a network. The folder then goes into the option evaluation.data_dir of pretrain_bliss.py.
"""

from __future__ import annotations

import argparse
import sys

from megatron_bliss.base.command import command
from megatron_bliss.data.text_tasks import KINDS, TextTaskSettings, make_text_tasks
from megatron_bliss.evaluation.data_files import write_checksums
from megatron_bliss.evaluation.huggingface_cache import SOURCES, default_cache, export_tasks


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--from-huggingface-cache", action="store_true", help="copy tasks of lm-eval out of the cache")
    source.add_argument("--from-text", nargs="+", metavar="INPUT", help="files, folders or globs of JSON lines")
    parser.add_argument("--output", required=True, help="folder for the task files")
    cache = parser.add_argument_group("from a Hugging Face cache")
    cache.add_argument("--cache-dir", help=f"cache of the datasets library (default: {default_cache()})")
    cache.add_argument("--tasks", nargs="+", choices=list(SOURCES), metavar="TASK", help="default: all ten")
    text = parser.add_argument_group("from text")
    add, default = text.add_argument, TextTaskSettings
    kinds = "last_word: out of all words; cloze: the last word out of a few; choice: which words come next; "
    add("--kind", nargs="+", choices=[*KINDS, "both"], default=["both"], help=f"{kinds}both: last_word and choice")
    add("--name", help="name of the task; of several kinds: NAME_KIND")
    add("--max-items", type=int, default=default.max_items, help="most items per task")
    add("--seed", type=int, default=default.seed, help="of the items, the wrong choices and their order")
    add("--json-keys", nargs="+", default=default.json_keys, help="keys that hold the text")
    add("--min-words", type=int, default=default.min_words, help="fewest words of a cloze passage")
    add("--max-words", type=int, default=default.max_words, help="most words of a cloze passage")
    add("--context-words", type=int, default=default.context_words, help="words before a choice")
    add("--continuation-words", type=int, default=default.continuation_words, help="words of a choice")
    add("--num-choices", type=int, default=default.num_choices, help="choices per item")
    return parser.parse_args(arguments)


def from_text(options: argparse.Namespace) -> None:
    """Make the tasks, record their checksums and print their sizes."""
    if not options.name:
        raise ValueError("found no name for the tasks, expected one: give --name")
    named = vars(options)
    same = {key: named[key] for key in TextTaskSettings.__dataclass_fields__ if key in named}
    asked = {"last_word", "choice"} if "both" in options.kind else set()
    kinds = tuple(kind for kind in KINDS if kind in asked | set(options.kind))
    record = make_text_tasks(TextTaskSettings(inputs=options.from_text, kinds=kinds, **same))
    write_checksums(options.output, list(record["tasks"]))
    for name, task in record["tasks"].items():
        chance = f", chance {task['chance']:.0%}" if "chance" in task else ""
        print(f"{options.output}/{task['file']}: task {name}, {task['items']:,} items{chance}")


@command("prepare_evaluation", (ValueError, FileNotFoundError))
def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    if options.from_text:
        from_text(options)
        return 0
    cache_dir = options.cache_dir or default_cache()
    found, missing = export_tasks(cache_dir, options.output, options.tasks or list(SOURCES))
    for line in found:
        print(line)
    if missing:
        print(f"prepare_evaluation: not found in {cache_dir}:", *missing, sep="\n  ", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
