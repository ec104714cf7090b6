"""Export what a run has learned to score units by, as a folder that scores any corpus with the same tokenizer.

  export_scorer.py runs/mine --round 4 --output scorer/
  score_corpus.py --scorer scorer/ --input 'crawl/*.json.gz' --output scored/

The folder holds scorer.json (what the scorer is and what it was trained on), scorer.safetensors (its weights) and the
tokenizer's file. Arms that learn a scorer: bliss and its variants, mates, classifier, dsir (its ratios, without noise).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import get_args

from megatron_bliss.base.command import command
from megatron_bliss.base.files import publish, sha256_file
from megatron_bliss.scorers.folder import DESCRIPTION, load_scorer, save_scorer
from megatron_bliss.scorers.windows import LongDocuments


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", help="run folder")
    add("--arm", default="bliss", help="whose scorer (default: bliss)")
    add("--round", type=int, help="of which round (default: the last one that is finished)")
    add("--output", required=True, help="folder to make; it must not exist")
    add("--tokenizer-model", help="the tokenizer's file, where it is no longer where the corpus was made from")
    add(
        "--long-documents",
        choices=get_args(LongDocuments),
        default="mean",
        help="score of a unit longer than a window: the mean of its windows' scores, weighted by tokens (default), the "
        "largest, or that of the first window, which is all that a run reads of it",
    )
    return parser.parse_args(arguments)


def find_scorer(run: Path, arm: str, number: int | None) -> Path:
    """The folder of a round's scorer in a run folder; ValueError that names what there is."""
    if not (run / "config.yaml").is_file():
        raise ValueError(f"found no config.yaml in {run}, expected a run folder")
    found = sorted(run.glob(f"*/round_*/score/scorer/{DESCRIPTION}"))
    rounds: dict[str, dict[int, Path]] = {}
    for path in found:
        name, stage = path.parts[-5], path.parts[-4]
        if (path.parents[1] / "done.json").is_file():
            rounds.setdefault(name, {})[int(stage.removeprefix("round_"))] = path.parent
    if arm not in rounds or (number is not None and number not in rounds[arm]):
        there = "; ".join(f"{name}: {', '.join(map(str, sorted(numbers)))}" for name, numbers in rounds.items())
        raise ValueError(
            f"found no finished scorer of arm {arm} {'' if number is None else f'in round {number} '}in {run}, "
            f"expected one of these (arm: rounds): {there or 'none yet'}; change --arm or --round"
        )
    return rounds[arm][max(rounds[arm]) if number is None else number]


def export(options: argparse.Namespace) -> str:
    """Make the folder; a line on what it is."""
    source, output = find_scorer(Path(options.run), options.arm, options.round), Path(options.output)
    if output.exists():
        raise ValueError(f"found {output}, expected a name that is free: remove it, or change --output")
    found = load_scorer(source)
    tokenizer = dict(found.tokenizer or {})
    scorer = dataclasses.replace(found.scorer, long_documents=options.long_documents)
    temporary = output.parent / f".{output.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        tokenizer["file"] = _copy_tokenizer(options, tokenizer, temporary)
        save_scorer(temporary, scorer, tokenizer)
        publish(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    trained_on = scorer.trained_on
    return (
        f"{output}: scorer of arm {trained_on.get('arm')}, round {trained_on.get('round')}, kind "
        f"{scorer.windows.kind}, windows of {scorer.window} tokens"
    )


def _copy_tokenizer(options: argparse.Namespace, tokenizer: dict, folder: Path) -> str | None:
    """Copy the tokenizer's file beside the scorer; its name there. The tokenizer of bytes has none."""
    if tokenizer.get("kind") == "bytes":
        return None
    path = Path(options.tokenizer_model or _recorded_file(options.run) or "")
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"found no tokenizer file {path}, expected the corpus's own: give --tokenizer-model")
    if sha256_file(path) != tokenizer.get("sha256"):
        raise ValueError(
            f"{path} has digest {sha256_file(path)[:12]}, expected {str(tokenizer.get('sha256'))[:12]}, that of the "
            "corpus's tokenizer: give its file with --tokenizer-model"
        )
    name = f"tokenizer{path.suffix}"
    shutil.copyfile(path, folder / name)
    return name


def _recorded_file(run: str) -> str | None:
    """Where the manifest of the run's corpus says that the tokenizer was."""
    import yaml

    from megatron_bliss.data.manifest import manifest_path, read_manifest

    prefix = yaml.safe_load((Path(run) / "config.yaml").read_text(encoding="utf-8"))["data"]["train_prefix"]
    if not os.path.isfile(manifest_path(prefix)):
        raise ValueError(
            f"found no corpus {prefix} from here, expected the run's, which names its tokenizer's file: go to the "
            "folder that the run was started in, or give --tokenizer-model"
        )
    return (read_manifest(prefix)["tokenizer"] or {}).get("file")


@command("export_scorer", (ValueError, OSError))
def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    print(export(parse_arguments(arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
