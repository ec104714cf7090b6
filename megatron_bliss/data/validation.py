"""Validation sets: an indexed dataset ``V.bin``/``V.idx`` plus ``V.labels.npy``, which says what is to be predicted.

``V.labels.npy`` is uint8, one per token of ``V.bin``, 1 where the token is a prediction target; never the first token
of a unit. Label "last-word": a passage is judged by its last word alone (LAMBADA); "all": by all tokens but the
first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from megatron_bliss.data.indexed import CorpusWriter, IndexedCorpus
from megatron_bliss.data.manifest import finished_manifest, read_manifest, write_manifest
from megatron_bliss.data.sources import (
    BadLine,
    LineBlock,
    SourceState,
    check_rejects,
    expand_inputs,
    parse_line,
    read_blocks,
    reject,
    write_rejects,
)
from megatron_bliss.data.tokenizers import Tokenizer, load_tokenizer
from megatron_bliss.files import atomic_file


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
    """What makes a validation set; ``split`` (i, n) takes every n-th line, beginning with the i-th (from 1)."""

    inputs: list[str]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str | None = None
    eod_token: str | None = None
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    label: Literal["last-word", "all"] = "last-word"
    max_length: int = 1024
    split: tuple[int, int] = (1, 1)
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.label not in ("last-word", "all"):
            raise ValueError(f"label is {self.label!r}, expected last-word or all: change --label")
        if self.max_length < 2:
            raise ValueError(f"longest unit is {self.max_length} tokens, expected at least 2: change --max-length")
        part, parts = self.split
        if not 1 <= part <= parts:
            raise ValueError(f"split is {part}/{parts}, expected 1/n to n/n: change --split")


def parse_split(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    try:
        part, parts = (int(number) for number in text.split("/"))
    except ValueError as error:
        raise ValueError(f"split is {text!r}, expected i/n such as 1/2: change --split") from error
    return part, parts


def label_last_word(ids: list[int], text: str, tokenizer: Tokenizer, max_length: int) -> list[tuple[list[int], int]]:
    """One unit (ids, first labelled position) for a passage whose last word is the label; its beginning may be cut.

    The label is the shortest run of last tokens whose text ends with the whole word, so it is right wherever the
    tokenizer puts word boundaries and spaces. ``text`` must not end with white space. Raises BadLine.
    """
    word = text.split()[-1]
    if word == text.strip():
        raise BadLine("a single word, expected a passage before it")
    start = len(ids) - 1
    while start > 0 and not tokenizer.decode(ids[start:]).endswith(word):
        start -= 1
    if start == 0:
        raise BadLine(f"the tokenizer does not give back the last word {word!r}")
    cut = max(0, len(ids) - max_length)
    if start <= cut:
        raise BadLine(f"the last word takes {len(ids) - start} tokens, expected fewer than the {max_length} of a unit")
    return [(ids[cut:], start - cut)]


def label_all(ids: list[int], max_length: int) -> list[tuple[list[int], int]]:
    """Units (ids, first labelled position) of a text judged by all its tokens: pieces of ``max_length``."""
    pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    units = [(piece, 1) for piece in pieces if len(piece) >= 2]
    if not units:
        raise BadLine("fewer than two tokens")
    return units


def prepare_validation(settings: ValidationSettings) -> dict:
    """Make the validation set ``settings.output_prefix``; returns its manifest. A finished one is left as it is.

    Raises ValueError when outputs of anything else are in the way, when more than ``max_bad_fraction`` of the lines
    cannot be used, or when nothing is left.
    """
    prefix = settings.output_prefix
    tokenizer = load_tokenizer(settings.tokenizer_type, settings.tokenizer_model, eod_token=settings.eod_token)
    sources = [SourceState(file) for file in expand_inputs(settings.inputs)]
    identity = _identity(settings, tokenizer)
    finished = finished_manifest(prefix, identity, [source.file for source in sources])
    if finished is not None:
        return finished
    labels, lines, rejects = [], 0, []
    with CorpusWriter(prefix, tokenizer.vocab_size) as writer:
        for block, number, line in _chosen_lines(sources, settings.split):
            lines += 1
            try:
                units = _units(line, block, settings, tokenizer)
            except BadLine as error:
                rejects.append(reject(block.file, number, str(error)))
                continue
            for ids, first in units:
                writer.add(np.array(ids), np.array([len(ids)]))
                labels.append(np.arange(len(ids)) >= first)
        with atomic_file(f"{prefix}.rejected.jsonl") as stream:
            write_rejects(stream, rejects)
        check_rejects(len(rejects), lines, settings.max_bad_fraction, f"{prefix}.rejected.jsonl")
        with atomic_file(f"{prefix}.labels.npy") as stream:
            np.save(stream, np.concatenate(labels).astype(np.uint8))
    counts = {"labelled": sum(int(mask.sum()) for mask in labels), "rejected": len(rejects)}
    return write_manifest(
        prefix, {**identity, **writer.record(counts), "sources": [source.record() for source in sources]}
    )


def _chosen_lines(sources: list[SourceState], split: tuple[int, int]) -> Iterator[tuple[LineBlock, int, bytes]]:
    part, parts = split
    count = 0
    for source in sources:
        for block in read_blocks(source):
            if block.damage:
                raise ValueError(f"{block.file}, line {block.first_line}: {block.damage}; get the file again")
            for number, line in block.lines():
                if count % parts == part - 1:
                    yield block, number, line
                count += 1


def _units(
    line: bytes, block: LineBlock, settings: ValidationSettings, tokenizer: Tokenizer
) -> list[tuple[list[int], int]]:
    text, _ = parse_line(line, settings.json_keys)
    if settings.label == "all":
        return label_all(tokenizer.encode_batch([text])[0], settings.max_length)
    text = text.rstrip()
    return label_last_word(tokenizer.encode_batch([text])[0], text, tokenizer, settings.max_length)


def _identity(settings: ValidationSettings, tokenizer: Tokenizer) -> dict:
    return {
        "kind": "validation",
        "unit": "passage" if settings.label == "last-word" else "piece",
        "label": settings.label,
        "max_length": settings.max_length,
        "split": list(settings.split),
        "tokenizer": tokenizer.identity(),
        "settings": {"json_keys": list(settings.json_keys)},
    }
