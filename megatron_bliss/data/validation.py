"""Validation sets: an indexed dataset ``V.bin``/``V.idx`` plus ``V.labels.npy``, which says what is to be predicted.

``V.labels.npy`` is uint8, one per token of ``V.bin``, 1 where the token is a prediction target; never the first token
of a unit. Label "last-word": a passage is judged by its last word alone (LAMBADA); "answer": an item of a task by the
right answer alone; "item": an item of a task with its right answer, and "all": any text, by all tokens but the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from megatron_bliss.base.files import atomic_file
from megatron_bliss.data.corpus_writer import CorpusWriter
from megatron_bliss.data.indexed import IndexedCorpus
from megatron_bliss.data.ingest.sources import (
    BadLine,
    LineBlock,
    SourceState,
    check_rejects,
    expand_inputs,
    read_blocks,
    reject,
    write_rejects,
)
from megatron_bliss.data.labels import label_line
from megatron_bliss.data.manifest import finished_manifest, read_manifest, write_manifest
from megatron_bliss.data.tokenizers import Tokenizer, load_tokenizer

LABELS = ("last-word", "answer", "item", "all")


class ValidationCorpus:
    """Reader of a validation set; ``len()`` units, ``manifest``, ``labels`` uint8[tokens]."""

    def __init__(self, prefix: str | os.PathLike) -> None:
        self.prefix = str(prefix)
        self.manifest = read_manifest(prefix)
        if self.manifest["kind"] != "validation":
            raise ValueError(
                f"{prefix} is a {self.manifest['kind']}, expected a validation set: make one with "
                "tools/prepare_validation.py"
            )
        self.corpus = IndexedCorpus(prefix)
        path = f"{prefix}.labels.npy"
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path} does not exist; make the validation set again with tools/prepare_validation.py"
            )
        self.labels = np.load(path, mmap_mode="r", allow_pickle=False)
        if self.labels.dtype != np.uint8 or self.labels.shape != self.corpus.tokens.shape:
            raise ValueError(
                f"{path} holds {self.labels.dtype}{list(self.labels.shape)}, expected "
                f"uint8[{len(self.corpus.tokens)}], one per token: make the validation set again"
            )

    def __reduce__(self):
        """Pickle as the path."""
        return ValidationCorpus, (self.prefix,)

    def __len__(self) -> int:
        """Number of units."""
        return len(self.corpus)

    def gather(self, ids: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Several units at once: (tokens int64[n, w], label_mask bool[n, w], lengths int64[n]), w the longest of them.

        Units longer than ``max_length`` lose their beginning, so that the label stays. Padding is 0 and unlabelled,
        and so is the first token of every row.
        """
        rows, columns, positions, lengths = self.corpus.token_positions(ids, max_length, keep="tail")
        tokens = np.zeros((len(lengths), int(lengths.max(initial=0))), dtype=np.int64)
        mask = np.zeros(tokens.shape, dtype=bool)
        tokens[rows, columns] = self.corpus.tokens[positions]
        mask[rows, columns] = self.labels[positions] == 1
        mask[:, :1] = False
        return tokens, mask, lengths


@dataclass(frozen=True)
class ValidationSettings:
    """What makes a validation set; ``split`` (i, n) takes every n-th line, beginning with the i-th (from 1).

    label: one for all inputs, or one each. weights: shares of the inputs (patterns) in the set, by number of units or
    of labelled tokens (``weight_by``); as many units are taken, drawn by ``seed``, as the shares leave room for.
    """

    inputs: list[str]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str | None = None
    eod_token: str | None = None
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    label: str | list[str] = "last-word"
    max_length: int = 1024
    split: tuple[int, int] = (1, 1)
    max_bad_fraction: float = 0.01
    weights: list[float] | None = None
    weight_by: Literal["units", "labels"] = "units"
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [label for label in self.labels if label not in LABELS]
        if unknown:
            raise ValueError(f"label is {unknown[0]!r}, expected {', '.join(LABELS)}: change --label")
        if len(self.labels) not in (1, len(self.inputs)):
            raise ValueError(
                f"{len(self.labels)} labels for {len(self.inputs)} inputs, expected one, or one each: change --label"
            )
        if self.weights is not None and (
            len(self.weights) != len(self.inputs) or min(self.weights) < 0 or not sum(self.weights) > 0
        ):
            raise ValueError(
                f"weights {self.weights} for {len(self.inputs)} inputs, expected one for each, 0 or more: --weights"
            )
        if self.max_length < 2:
            raise ValueError(f"longest unit is {self.max_length} tokens, expected at least 2: change --max-length")
        part, parts = self.split
        if not 1 <= part <= parts:
            raise ValueError(f"split is {part}/{parts}, expected 1/n to n/n: change --split")

    @property
    def labels(self) -> list[str]:
        """The labels given: one, or one per input."""
        return [self.label] if isinstance(self.label, str) else list(self.label)


@dataclass
class InputUnits:
    """Labelled units of one input: tokens int32[t] and the first labelled one of each; what could not be used."""

    name: str
    label: str
    tokens: list[np.ndarray] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    rejects: list[dict] = field(default_factory=list)
    lines: int = 0

    @property
    def labelled(self) -> np.ndarray:
        """int64[units]: labelled tokens per unit."""
        lengths = np.array([len(tokens) for tokens in self.tokens], dtype=np.int64)
        return lengths - np.array(self.firsts, dtype=np.int64)

    def take(self, ids: np.ndarray) -> InputUnits:
        """The same with some of the units."""
        tokens, firsts = [self.tokens[unit] for unit in ids], [self.firsts[unit] for unit in ids]
        return replace(self, tokens=tokens, firsts=firsts)

    def record(self) -> dict:
        """What a manifest says of it."""
        labelled = int(self.labelled.sum())
        return {"input": self.name, "label": self.label, "units": len(self.tokens), "labelled": labelled}


def parse_split(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    try:
        part, parts = (int(number) for number in text.split("/"))
    except ValueError as error:
        raise ValueError(f"split is {text!r}, expected i/n such as 1/2: change --split") from error
    return part, parts


def prepare_validation(settings: ValidationSettings) -> dict:
    """Make the validation set ``settings.output_prefix``; returns its manifest. A finished one is left as it is.

    Raises ValueError when outputs of anything else are in the way, when more than ``max_bad_fraction`` of the lines
    of an input cannot be used, or when nothing is left.
    """
    prefix = settings.output_prefix
    tokenizer = load_tokenizer(settings.tokenizer_type, settings.tokenizer_model, eod_token=settings.eod_token)
    sources = [SourceState(file) for file in expand_inputs(settings.inputs)]
    identity = _identity(settings, tokenizer)
    finished = finished_manifest(prefix, identity, [source.file for source in sources])
    if finished is not None:
        return finished
    inputs = list(_read_inputs(settings, sources, tokenizer))
    with CorpusWriter(prefix, tokenizer.vocab_size) as writer:
        with atomic_file(f"{prefix}.rejected.jsonl") as stream:
            write_rejects(stream, [entry for one in inputs for entry in one.rejects])
        for one in inputs:
            check_rejects(len(one.rejects), one.lines, settings.max_bad_fraction, f"{prefix}.rejected.jsonl")
        if settings.weights is not None:
            inputs = mix(inputs, settings.weights, settings.weight_by, settings.seed)
        for one in inputs:
            writer.add(
                np.concatenate(one.tokens or [[]]), np.array([len(tokens) for tokens in one.tokens], dtype=np.int64)
            )
        masks = [
            np.arange(len(ids)) >= first for one in inputs for ids, first in zip(one.tokens, one.firsts, strict=True)
        ]
        with atomic_file(f"{prefix}.labels.npy") as stream:
            np.save(stream, np.concatenate(masks).astype(np.uint8))
    counts = {
        "labelled": sum(int(one.labelled.sum()) for one in inputs),
        "rejected": sum(len(one.rejects) for one in inputs),
    }
    made = {**writer.record(counts), "inputs": [one.record() for one in inputs]}
    return write_manifest(prefix, {**identity, **made, "sources": [source.record() for source in sources]})


def mix(inputs: list[InputUnits], weights: list[float], weight_by: str, seed: int) -> list[InputUnits]:
    """The largest part of the inputs in which they have the shares that ``weights`` ask for; order is kept."""
    sizes = [one.labelled if weight_by == "labels" else np.ones(len(one.tokens), np.int64) for one in inputs]
    room = min(float(size.sum()) / weight for size, weight in zip(sizes, weights, strict=True) if weight > 0)
    mixed, generator = [], np.random.default_rng(seed)
    for one, size, weight in zip(inputs, sizes, weights, strict=True):
        order = generator.permutation(len(size))
        fits = np.cumsum(size[order]) <= weight * room + 1e-6
        mixed.append(one.take(np.sort(order[fits])))
    if not all(one.tokens for one, weight in zip(mixed, weights, strict=True) if weight > 0):
        raise ValueError(
            f"a mixture with weights {weights} leaves no unit of some input, expected at least one of each: give more "
            "text or change --weights"
        )
    return mixed


def _read_inputs(
    settings: ValidationSettings, sources: list[SourceState], tokenizer: Tokenizer
) -> Iterator[InputUnits]:
    """Labelled units of each input, in order."""
    labels = settings.labels * (len(settings.inputs) // len(settings.labels))
    remaining, count = iter(sources), 0
    for pattern, label in zip(settings.inputs, labels, strict=True):
        found = InputUnits(pattern, label)
        for _ in expand_inputs([pattern]):
            for block, number, line in _lines(next(remaining)):
                count += 1
                if (count - settings.split[0]) % settings.split[1]:
                    continue
                found.lines += 1
                try:
                    units = label_line(line, label, settings.json_keys, tokenizer, settings.max_length)
                except BadLine as error:
                    found.rejects.append(reject(block.file, number, str(error)))
                    continue
                found.tokens += [np.array(ids, dtype=np.int32) for ids, _ in units]
                found.firsts += [first for _, first in units]
        yield found


def _lines(source: SourceState) -> Iterator[tuple[LineBlock, int, bytes]]:
    for block in read_blocks(source):
        if block.damage:
            raise ValueError(f"{block.file}, line {block.first_line}: {block.damage}; get the file again")
        for number, line in block.lines():
            yield block, number, line


def _identity(settings: ValidationSettings, tokenizer: Tokenizer) -> dict:
    units = {"piece" if label in ("all", "item") else "passage" for label in settings.labels}
    mixture = {"weights": settings.weights, "weight_by": settings.weight_by, "seed": settings.seed}
    return {
        "kind": "validation",
        "unit": units.pop() if len(units) == 1 else "mixed",
        "label": settings.labels[0] if len(set(settings.labels)) == 1 else settings.labels,
        "max_length": settings.max_length,
        "split": list(settings.split),
        "tokenizer": tokenizer.identity(),
        "settings": {"json_keys": list(settings.json_keys), **(mixture if settings.weights is not None else {})},
    }
