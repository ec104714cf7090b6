"""A scorer as a folder: ``scorer.json``, ``scorer.safetensors`` and, once exported, the tokenizer's file.

Anyone may have written it, so nothing in it is run or believed: no pickle, every field of its type, every size held
against the weights that are there, all of them finite.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from megatron_bliss.base.files import publish, read_json, sha256_file, sha256_text, write_json
from megatron_bliss.scorers.ngrams import NgramScorer
from megatron_bliss.scorers.record import record_of
from megatron_bliss.scorers.scorer import Scorer, WindowScorer
from megatron_bliss.scorers.windows import LongDocuments

DESCRIPTION, WEIGHTS = "scorer.json", "scorer.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class _Description:
    """What scorer.json holds."""

    format_version: int
    kind: str
    model: dict
    window: int
    long_documents: LongDocuments
    unit: str
    ends_documents: bool
    tokenizer: dict | None
    weights_sha256: str
    trained_on: dict


@dataclass(frozen=True)
class ScorerFolder:
    """A scorer that was read from a folder."""

    scorer: Scorer
    tokenizer: dict | None
    """kind, sha256, vocab_size, eod, and its file in the folder, if it is there; None: not known."""
    weights_sha256: str
    path: str

    @property
    def digest(self) -> str:
        """Of all that decides a score."""
        scorer = self.scorer
        model = json.dumps(scorer.windows.describe(), sort_keys=True)
        reading = (scorer.window, scorer.long_documents, scorer.ends_documents)
        return sha256_text(scorer.windows.kind, self.weights_sha256, model, *map(str, reading))

    def with_long_documents(self, how: LongDocuments) -> ScorerFolder:
        """The same scorer, which makes one score of a long unit's windows in another way."""
        return replace(self, scorer=replace(self.scorer, long_documents=how))


def _kind(name: str) -> type[WindowScorer]:
    if name == NgramScorer.kind:
        return NgramScorer
    if name == "model":
        from megatron_bliss.scorers.models import ModelScorer  # loads torch, which n-grams do without

        return ModelScorer
    raise ValueError(f"found a scorer of kind {name!r}, expected ngrams or model: export it again")


def save_scorer(folder: str | os.PathLike, scorer: Scorer, tokenizer: dict | None) -> None:
    """Write a scorer; the description comes last, so that a folder with one is complete.

    tokenizer: of the corpus it was trained on (Tokenizer.identity), with a file that lies in the folder or none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{WEIGHTS}.{os.getpid()}.tmp"
    save_file({name: np.ascontiguousarray(array) for name, array in scorer.windows.weights().items()}, temporary)
    with open(temporary, "rb+") as stream:
        os.fsync(stream.fileno())
    publish(temporary, folder / WEIGHTS)
    description = {
        "format_version": FORMAT_VERSION,
        "kind": scorer.windows.kind,
        "model": scorer.windows.describe(),
        "window": scorer.window,
        "long_documents": scorer.long_documents,
        "unit": scorer.unit,
        "ends_documents": scorer.ends_documents,
        "tokenizer": tokenizer,
        "weights_sha256": sha256_file(folder / WEIGHTS),
        "trained_on": scorer.trained_on,
    }
    write_json(folder / DESCRIPTION, description)


def load_scorer(folder: str | os.PathLike) -> ScorerFolder:
    """Read a folder that :func:`save_scorer` wrote; ValueError for anything else, FileNotFoundError for none."""
    path = Path(folder)
    if not (path / DESCRIPTION).is_file():
        raise FileNotFoundError(
            f"found no {DESCRIPTION} in {path}, expected a scorer: make one with tools/export_scorer.py"
        )
    found = read_json(path / DESCRIPTION)
    if found.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"found format version {found.get('format_version')!r} in {path / DESCRIPTION}, expected {FORMAT_VERSION}: "
            "export the scorer with this version of the program"
        )
    try:
        description = record_of(_Description, found)
        if description.window < 1:
            raise ValueError(f"found a window of {description.window} tokens, expected 1 or more: export it again")
        windows = _kind(description.kind).load(description.model, _weights(path, description.weights_sha256))
    except (ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"{path} is no usable scorer: {error}") from error
    kept = (description.window, description.long_documents, description.unit, description.ends_documents)
    scorer = Scorer(windows, *kept, description.trained_on)
    return ScorerFolder(scorer, description.tokenizer, description.weights_sha256, str(path))


def _weights(path: Path, expected: str) -> dict[str, np.ndarray]:
    if not (path / WEIGHTS).is_file() or sha256_file(path / WEIGHTS) != expected:
        raise ValueError(
            f"{WEIGHTS} is missing, or is not the one that {DESCRIPTION} describes: copy the folder as a whole"
        )
    weights = load_file(path / WEIGHTS)
    for name, array in weights.items():
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(f"found {name} {array.dtype} with values that are no finite numbers, expected numbers")
    return weights
