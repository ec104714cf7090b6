"""Score a corpus, or raw text, with a scorer that was exported from a run (tools/export_scorer.py).

  score_corpus.py --scorer scorer/ --corpus data/pool --output scored/
  score_corpus.py --scorer scorer/ --input 'crawl/*.json.gz' --output scored/ --export chosen.jsonl.gz --fraction 0.2

Any number of processes may do it: the same command started several times, on any machines that share the output's file
system, under torchrun (one process per GPU), or as --shard i/n of an array of jobs. They share the work out among
themselves, go on after a kill when the command is given again, and come to the same scores.

Output: scores.npy (float32, one per unit) and scores.json; of raw text also provenance.parquet (file, line, url,
domain, ...), lengths.npy (tokens) and rejected.jsonl. tools/subset_index.py selects from the scores of a corpus;
--export writes the chosen documents of raw text, with their scores and ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from megatron_bliss.base.command import command
from megatron_bliss.config.selection import SelectionConfig
from megatron_bliss.data.ingest.shards import parse_shard
from megatron_bliss.data.tokenizers import Tokenizer, load_recorded_tokenizer
from megatron_bliss.scorers.corpus_job import score_corpus
from megatron_bliss.scorers.folder import ScorerFolder, load_scorer
from megatron_bliss.scorers.job import Share
from megatron_bliss.scorers.text_job import TextSettings, score_text
from megatron_bliss.scorers.windows import LongDocuments
from megatron_bliss.selection.command_line import add_policy_options, given_selection, given_settings
from megatron_bliss.selection.export import export_scored_text
from megatron_bliss.selection.row_files import check_row_file
from megatron_bliss.selection.scored_text import ScoredText
from megatron_bliss.selection.select import apply_to_units, selection_lines


def parse_device(text: str) -> str:
    """The name of a device."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected cpu, cuda or cuda:N")
    return text


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scorer", required=True, help="folder that tools/export_scorer.py made")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", metavar="PREFIX", help="indexed corpus or subset")
    source.add_argument("--input", nargs="+", help="raw text: files, folders or globs, as of tools/preprocess_data.py")
    add("--output", required=True, help="folder of the scores")
    add("--json-keys", nargs="+", default=["text"], help="raw text: keys that hold the text")
    add("--max-bad-fraction", type=float, default=0.01, help="raw text: share of lines that may be set aside")
    add("--long-documents", choices=get_args(LongDocuments), help="in place of what the scorer says")
    add("--shard", type=parse_shard, help="i/n: score the i-th of n shares only, and do not wait for the others")
    add(
        "--device",
        type=parse_device,
        help="cpu, cuda, cuda:N (default: a GPU where there is one; n-grams need none)",
    )
    add("--params-dtype", choices=["fp32", "bf16"], help="of a model's trunk (default: bf16 on a GPU, fp32 on a CPU)")
    add("--memory-gib", type=float, help="bound of a batch's activations (default: 4 on a GPU, 0.25 on a CPU)")
    add("--compile", action="store_true", help="fuse a model's element-wise work: half a minute, then faster")
    add("--threads", type=int, help="of a process (default: OMP_NUM_THREADS, else a rank's share of the cores)")
    add("--quiet", action="store_true", help="show no progress")
    add(
        "--export",
        metavar="FILE",
        help="raw text: write the chosen documents to this .jsonl, .jsonl.gz, .jsonl.zst or .parquet, new or not",
    )
    add("--export-text", choices=["source", "none"], default="source", help="export: with their text, or lines alone")
    add("--seed", type=int, default=0, help="export: of all that a policy draws")
    add_policy_options(parser)
    return parser.parse_args(arguments)


def share_of(options: argparse.Namespace) -> Share:
    """This process's share: of --shard, else of torchrun's ranks."""
    if options.shard:
        number, count = options.shard
        if not 1 <= number <= count:
            raise ValueError(f"found --shard {number}/{count}, expected 1/n to n/n")
        return Share(number - 1, count, alone=True)
    return Share(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def prepared(found: ScorerFolder, options: argparse.Namespace) -> ScorerFolder:
    """The scorer, set up for this machine."""
    how = options.long_documents or found.scorer.long_documents
    found = found.with_long_documents(how)
    if found.scorer.windows.kind != "model":
        return found
    import torch

    from megatron_bliss.scorers.models import ModelScorer, Reading, batch_tokens

    cuda = torch.cuda.is_available()
    device = torch.device(options.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"))
    on_gpu = device.type == "cuda"
    if on_gpu and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"found {torch.cuda.device_count()} GPUs, expected {device}: change --device")
    dtype = options.params_dtype or ("bf16" if on_gpu else "fp32")
    bound = options.memory_gib or (4.0 if on_gpu else 0.25)
    model = found.scorer.windows.model
    reading = Reading(device, batch_tokens(model, dtype, bound), dtype, options.compile)
    scorer = dataclasses.replace(found.scorer, windows=ModelScorer(model, reading))
    return dataclasses.replace(found, scorer=scorer)


@contextlib.contextmanager
def threads(found: ScorerFolder, given: int | None) -> Iterator[None]:
    """As many of them as asked for, or this rank's share of the cores, for as long as a model reads."""
    if found.scorer.windows.kind != "model":
        yield
        return
    import torch

    from megatron_bliss.base.platform import set_threads

    before = torch.get_num_threads()
    set_threads(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if given:
        torch.set_num_threads(given)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tokenizer_of(found: ScorerFolder) -> Tokenizer:
    """The tokenizer in the scorer's folder; ValueError where it is another one."""
    name = found.tokenizer and found.tokenizer.get("file")
    is_there = name and (Path(found.path) / Path(name).name).is_file()
    if found.tokenizer is None or (found.tokenizer["kind"] != "bytes" and not is_there):
        raise ValueError(
            f"found no tokenizer file in {found.path}, expected the one of the corpus that the scorer was trained on: "
            "copy the folder as a whole, or export the scorer again where that file is"
        )
    return load_recorded_tokenizer(found.tokenizer, name and Path(found.path) / Path(name).name)


def run(options: argparse.Namespace) -> bool:
    """Score; whether the scores are there now."""
    found, folder, share = prepared(load_scorer(options.scorer), options), Path(options.output), share_of(options)
    show = not options.quiet and share.index == 0
    with threads(found, options.threads):
        if options.corpus:
            return score_corpus(options.corpus, found, folder, share, show=show)
        settings = TextSettings(options.input, options.json_keys, options.max_bad_fraction)
        return score_text(settings, found, tokenizer_of(found), folder, share, show=show)


def check(options: argparse.Namespace) -> SelectionConfig | None:
    """The selection of an export, if there is one; ValueError for options that cannot work, before anything is done."""
    if Path(options.output).exists() and not Path(options.output).is_dir():
        raise ValueError(f"found {options.output}, which is no folder, expected one or a free name: change --output")
    for name in ("threads", "memory_gib"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"found --{name.replace('_', '-')} {value}, expected more than 0")
    if not 0 <= options.max_bad_fraction <= 1:
        raise ValueError(f"found --max-bad-fraction {options.max_bad_fraction}, expected 0 to 1")
    if not options.export:
        unused = given_settings(options)
        if unused:
            raise ValueError(f"found --{unused[0].replace('_', '-')} without --export, expected both or none of them")
        return None
    if options.corpus:
        raise ValueError(
            "found --export with --corpus, expected it with --input: select from a corpus's scores with "
            "tools/subset_index.py, which takes --export, too"
        )
    check_row_file(options.export)
    own = [(Path(options.output) / name).resolve() for name in ("provenance.parquet", "rejected.jsonl")]
    if Path(options.export).resolve() in own:
        raise ValueError(f"found --export {options.export}, a file of the scores themselves, expected another name")
    return given_selection(options)


def export(options: argparse.Namespace, selection: SelectionConfig) -> str:
    """Write the chosen documents; a line on them."""
    units = ScoredText(options.output)
    ids, policy, _ = apply_to_units(units, units.scores, selection, seed=options.seed)
    export_scored_text(options.output, ids, None, options.json_keys, options.export, text=options.export_text)
    lines = [f"{options.export}: {len(ids):,} of {len(units):,} documents", *selection_lines(policy)]
    return "\n".join(lines)


@command("score_corpus", (ValueError, OSError))
def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    selection = check(options)
    done = run(options)
    if not options.shard and share_of(options).index:
        return 0  # one of torchrun's ranks is enough to tell, and to export
    print(f"{options.output}: {'scored' if done else 'this share is done, others are not yet'}")
    if done and selection is not None:
        print(export(options, selection))
    return 0


if __name__ == "__main__":
    sys.exit(main())
