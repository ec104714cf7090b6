"""An indexed corpus through a scorer: ``scores.npy`` with one float32 per unit, and ``scores.json``.

The corpus is cut at fixed units into parts, and a part into the blocks that a run's score stage has, too: batches are
made within a block, so that a unit's score does not depend on who scores it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron_bliss.base.files import atomic_file, read_json, write_json
from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.manifest import corpus_digest, read_manifest
from megatron_bliss.scorers.folder import ScorerFolder
from megatron_bliss.scorers.job import PART, Parts, Share, run
from megatron_bliss.scorers.scorer import NotFinite, Scorer
from megatron_bliss.scorers.units import flat_units
from megatron_bliss.selection.score_pass import BLOCK_UNITS, save_array

PART_BLOCKS = 4
"""Blocks of a part: what a killed process can lose."""


def score_corpus(prefix: str, found: ScorerFolder, folder: Path, share: Share, *, show: bool) -> bool:
    """Score every unit of a corpus or subset; whether the scores are there now (another shard may be at work).

    Raises ValueError where the corpus was made with another tokenizer, or other scores lie in the folder.
    """
    check_tokenizer(found, read_manifest(prefix)["tokenizer"], prefix)
    record = {"corpus_digest": corpus_digest(prefix), "scorer": identity(found)}
    if is_finished(folder, record):
        return True
    corpus = IndexedCorpus(prefix)
    corpus.release()  # opening it has read the whole index
    starts = range(0, len(corpus), PART_BLOCKS * BLOCK_UNITS)
    bounds = [(start, min(start + PART_BLOCKS * BLOCK_UNITS, len(corpus))) for start in starts]

    def make(number: int, path: Path, tick: Callable[[int], None]) -> None:
        save_array(path, np.concatenate(list(_scored(found.scorer, corpus, *bounds[number], tick))))
        corpus.release()

    def finish(work: Path) -> None:
        arrays = (np.load(work / f"{name}{PART}", allow_pickle=False) for name in names)
        write_column(folder / "scores.npy", len(corpus), "<f4", arrays)
        write_json(folder / "scores.json", record)

    names = [f"{start:012d}" for start, _ in bounds]
    sizes = [stop - start for start, stop in bounds]
    parts = Parts(record, names, sizes, "units", make, finish, lambda: is_finished(folder, record))
    return run(folder, parts, share, show=show)


def _scored(
    scorer: Scorer, corpus: IndexedCorpus, start: int, stop: int, tick: Callable[[int], None]
) -> Iterator[np.ndarray]:
    for first in range(start, stop, BLOCK_UNITS):
        last = min(first + BLOCK_UNITS, stop)
        try:
            yield scorer.score(*flat_units(corpus, first, last))
        except NotFinite as error:
            raise ValueError(
                f"found scores that are not finite for units {(error.places[:10] + first).tolist()} of "
                f"{corpus.prefix}, expected numbers: the scorer is damaged or diverged; export another one"
            ) from error
        tick(last - first)


def write_column(path: Path, count: int, dtype: str, arrays: Iterator[np.ndarray]) -> None:
    """A .npy file of one column from its parts, with the memory of one; ValueError where they are not ``count``."""
    written = 0
    with atomic_file(path) as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": (count,)})
        for array in arrays:
            stream.write(np.ascontiguousarray(array, dtype=dtype))
            written += len(array)
        if written != count:
            raise ValueError(f"found {written} rows in parts of {path}, expected {count}: remove {path.parent}")


def identity(found: ScorerFolder) -> dict:
    """What scores say of their scorer."""
    scorer = found.scorer
    return {
        "digest": found.digest,
        "kind": scorer.windows.kind,
        "window": scorer.window,
        "long_documents": scorer.long_documents,
        "trained_on": scorer.trained_on,
    }


def check_tokenizer(found: ScorerFolder, tokenizer: dict | None, of: str) -> None:
    """ValueError where a corpus has another tokenizer than the scorer's; one that says of none is taken as it is."""
    if found.tokenizer is None or tokenizer is None:
        return
    keys = ("kind", "sha256", "vocab_size", "eod")
    ours, theirs = ({key: one.get(key) for key in keys} for one in (found.tokenizer, tokenizer))
    if ours != theirs:
        described = [f"{one['kind']} {str(one['sha256'])[:12]}, EOD {one['eod']}" for one in (ours, theirs)]
        raise ValueError(
            f"found tokenizer {described[1]} of {of}, expected the scorer's, {described[0]}: its tokens mean other "
            "text: score the raw text with --input, or make the corpus with the tokenizer in the scorer's folder"
        )


def is_finished(folder: Path, record: dict) -> bool:
    """Whether the folder has these very scores; ValueError where it has others, which are never overwritten."""
    if not (folder / "scores.json").is_file():
        if os.path.exists(folder / "scores.npy") and not os.path.exists(folder / "work"):
            raise ValueError(f"found scores.npy without scores.json in {folder}, expected a new one: change --output")
        return False
    present = read_json(folder / "scores.json")
    different = [name for name in record if present.get(name) != record[name]]
    if different:
        raise ValueError(
            f"found scores in {folder} that differ in {' and '.join(different)} from those asked for, expected a new "
            "folder or the same scores: change --output"
        )
    return True
