"""Keep benchmarks out of the training data: list or drop what shares n-grams of words with evaluation files.

A unit (of a corpus: what is selected; of raw text: a document) is hit if it shares one n-gram. The folder then holds

* ``contaminated.jsonl``: a line for every unit that is hit,
* ``contaminated.npy``: int64, their numbers in the corpus, increasing (of a corpus only),
* ``decontamination.json``: settings, counts and digests, written last,
* with ``drop``: a subset without these units, or ``clean.jsonl.gz``, the other documents.

An n-gram that the edge of a unit cuts in two is in neither: a corpus of windows misses some that its raw text has.
"""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import orjson

from megatron_bliss.base.files import atomic_file, sha256_file, write_json
from megatron_bliss.base.progress import Progress, progress
from megatron_bliss.data.evaluation_text import read_records
from megatron_bliss.data.indexed import IndexedCorpus, blocks
from megatron_bliss.data.ingest.originals import OriginalReader
from megatron_bliss.data.ingest.sources import expand_inputs, reject
from megatron_bliss.data.manifest import corpus_digest, manifest_path, read_manifest
from megatron_bliss.data.shared_ngrams import EvaluationText, Hit, SharedNgrams
from megatron_bliss.data.subset import write_subset
from megatron_bliss.data.tokenizers import load_recorded_tokenizer

RECORD, HITS, NUMBERS, CLEAN = "decontamination.json", "contaminated.jsonl", "contaminated.npy", "clean.jsonl.gz"
USUAL_SHORTEST = 8
BLOCK_TOKENS, BLOCK_BYTES = 1 << 18, 1 << 20
SHOWN_REJECTS = 3


@dataclass(frozen=True)
class DecontaminationSettings:
    """What to look for, and where: ``corpus`` or ``inputs``, not both."""

    evaluation: Sequence[str]
    """Files, folders or globs that must not be in the training data."""
    output: str
    """Folder for the result."""
    corpus: str | None = None
    """Prefix of a corpus or subset."""
    inputs: Sequence[str] = ()
    """Files, folders or globs of raw text."""
    ngram: int = 13
    """Words of an n-gram."""
    shortest: int | None = None
    """A text of fewer words than ``ngram`` is looked for as a whole if it has so many. None: 8, at most ``ngram``."""
    json_keys: Sequence[str] = ()
    """Keys of evaluation records, at any depth, whose strings count; none: all strings."""
    input_keys: Sequence[str] = ("text",)
    """Keys that hold the text of raw documents; several are joined by a newline."""
    drop: bool = False
    """Also write what is left."""
    tokenizer_model: str | None = None
    """The corpus's tokenizer file, if it is not where the manifest says."""

    @property
    def least_words(self) -> int:
        """``shortest``, or its default."""
        return min(USUAL_SHORTEST, self.ngram) if self.shortest is None else self.shortest


@dataclass
class Block:
    """Some units: ``texts`` of unit ``units[k]``, not decreasing, counted from 0 in the block; and how to name one."""

    texts: list[str]
    units: list[int]
    count: int
    first_unit: int = 0
    file: str | None = None
    lines: list[int] = field(default_factory=list)
    originals: list[bytes] = field(default_factory=list)

    def name(self, unit: int) -> dict:
        """{unit} of a corpus, {file, line} of a document."""
        if self.file is None:
            return {"unit": self.first_unit + unit}
        return {"file": self.file, "line": self.lines[unit]}


class CorpusUnits:
    """The units of a corpus as text. Raises ValueError for one whose tokenizer is not known or not to be found."""

    def __init__(self, settings: DecontaminationSettings) -> None:
        self.prefix, manifest = str(settings.corpus), read_manifest(str(settings.corpus))
        if manifest.get("tokenizer") is None:
            raise ValueError(
                f"found no tokenizer in {manifest_path(self.prefix)}, expected the one that made the corpus: "
                "change it with tools/inspect_index.py adopt --tokenizer-type"
            )
        if settings.drop and manifest["kind"] == "validation":
            raise ValueError(f"found a validation set at {self.prefix}, expected a corpus or subset: leave out --drop")
        self._digest, self._corpus = corpus_digest(self.prefix), IndexedCorpus(self.prefix)
        self._tokenizer = load_recorded_tokenizer(manifest["tokenizer"], settings.tokenizer_model)

    def blocks(self, show: bool) -> Iterator[Block]:
        """Blocks of about ``BLOCK_TOKENS`` tokens, or of one unit."""
        with progress(len(self._corpus), description="units", unit="units", enabled=show) as bar:
            for part in blocks(len(self._corpus)):
                ends = np.cumsum(self._corpus.lengths[part], dtype=np.int64)
                cuts = np.flatnonzero(np.diff(ends // BLOCK_TOKENS)) + 1
                bounds = [0, *cuts.tolist(), len(ends)]
                for start, stop in zip(bounds, bounds[1:], strict=False):
                    yield self._block(part.start + start, part.start + stop)
                    bar.update(stop - start)

    def _block(self, start: int, stop: int) -> Block:
        texts, units = [], []
        for unit in range(start, stop):
            for piece in self._documents(self._corpus[unit]):
                texts.append(self._tokenizer.decode(piece.tolist()))
                units.append(unit - start)
        return Block(texts, units, stop - start, start)

    def _documents(self, tokens: np.ndarray) -> list[np.ndarray]:
        """The tokens between those that end a document."""
        ends = np.flatnonzero(tokens == self._tokenizer.eod)
        return [piece[piece != self._tokenizer.eod] for piece in np.split(tokens, ends)]

    def record(self) -> dict:
        """What was looked at, for ``decontamination.json``."""
        return {"corpus": {"prefix": self.prefix, "digest": self._digest}}


class InputDocuments:
    """Raw documents; ``rejects`` are the first lines that preprocessing would reject, ``rejected`` is their number."""

    def __init__(self, settings: DecontaminationSettings) -> None:
        self.files = expand_inputs(settings.inputs)
        self._keys, self._drop = settings.input_keys, settings.drop
        self.rejected, self.rejects = 0, []
        self._sources: list[dict] = []

    def blocks(self, show: bool) -> Iterator[Block]:
        """Blocks of about ``BLOCK_BYTES`` bytes of text, or of one line."""
        total = sum(os.path.getsize(file) for file in self.files)
        with progress(total, description="documents", unit="bytes", enabled=show) as bar:
            for file in self.files:
                done = bar.done
                yield from self._file_blocks(file, bar)
                bar.update(done + self._sources[-1]["bytes"] - bar.done)

    def _file_blocks(self, file: str, bar: Progress) -> Iterator[Block]:
        reader, done = OriginalReader(file, self._keys, BLOCK_BYTES), bar.done
        for found in reader.documents():
            count = len(found.texts)
            originals = reader.originals(found) if self._drop else []
            yield Block(found.texts, list(range(count)), count, file=file, lines=found.lines, originals=originals)
            self.rejected += len(found.rejects)
            room = SHOWN_REJECTS - len(self.rejects)
            self.rejects += [reject(file, line, reason) for line, reason in found.rejects[: max(room, 0)]]
            bar.update(done + reader.file_bytes - bar.done)
        self._sources.append(reader.finish())

    def record(self) -> dict:
        """What was looked at, for ``decontamination.json``."""
        return {"inputs": self._sources, "first_rejects": self.rejects}


def decontaminate(settings: DecontaminationSettings, *, show_progress: bool = False) -> dict:
    """Look for evaluation text and write the folder; returns the content of ``decontamination.json``.

    Raises ValueError for settings that cannot be, an evaluation file without text, and with ``drop`` where nothing
    would be left. Memory: the words and n-grams of the evaluation files, one block of units, 8 bytes for each hit.
    """
    _check(settings)
    source = CorpusUnits(settings) if settings.corpus is not None else InputDocuments(settings)
    files = expand_inputs(settings.evaluation, option="--evaluation")
    evaluation = read_evaluation(files, settings, show_progress)
    Path(settings.output).mkdir(parents=True, exist_ok=True)
    search = _Search(settings, evaluation, SharedNgrams(evaluation))
    counts = search.run(source, show_progress)
    if settings.drop and counts["units_hit"] == counts["units"]:
        raise ValueError(
            f"found evaluation text in all {counts['units']:,} units, expected some without: leave out --drop or "
            "change --ngram"
        )
    options = {name: value for name, value in asdict(settings).items() if name not in ("evaluation", "output")}
    options |= {name: list(options[name]) for name in ("inputs", "json_keys", "input_keys")}
    options |= {"shortest": settings.least_words}
    record = {"format": 1, "settings": options, "counts": counts, "evaluation": search.evaluation_record()}
    record |= source.record() | search.write_rest(record["evaluation"])
    write_json(Path(settings.output) / RECORD, record)
    return record


def read_evaluation(files: Sequence[str], settings: DecontaminationSettings, show: bool) -> EvaluationText:
    """The text of all evaluation files. Raises ValueError for one without any that is long enough."""
    evaluation = EvaluationText(settings.ngram, settings.least_words)
    for path in progress(files, description="evaluation", unit="files", enabled=show):
        evaluation.add_file(path)
        for line, texts in read_records(path, settings.json_keys):
            evaluation.add_record(line, texts)
        if evaluation.records[-1] == evaluation.left_out[-1]:
            keys = f" under {', '.join(settings.json_keys)}" if settings.json_keys else ""
            raise ValueError(
                f"found no text of {settings.least_words} words or more{keys} in {path}, expected at least one: "
                f"change --evaluation, {'--json-keys ' if keys else ''}or --shortest"
            )
    return evaluation


class _Search:
    """One run over the units: what it finds goes to files as it comes."""

    def __init__(self, settings: DecontaminationSettings, evaluation: EvaluationText, ngrams: SharedNgrams) -> None:
        self._settings, self._evaluation, self._ngrams = settings, evaluation, ngrams
        self._folder = Path(settings.output)
        self._file_hits = np.zeros(len(evaluation.files), dtype=np.int64)
        self._numbers: list[np.ndarray] = []
        self._units = self._hits = 0

    def run(self, source: CorpusUnits | InputDocuments, show: bool) -> dict:
        """Look at every unit; returns the counts."""
        with contextlib.ExitStack() as files:
            lines = files.enter_context(atomic_file(self._folder / HITS))
            clean = None
            if self._settings.drop and self._settings.corpus is None:
                raw = files.enter_context(atomic_file(self._folder / CLEAN))
                clean = files.enter_context(
                    gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=3, mtime=0)
                )
            for block in source.blocks(show):
                self._look(block, lines, clean)
        if not self._units:
            keys = ", ".join(self._settings.input_keys)
            raise ValueError(
                f"found no text in the input, expected documents under {keys}: change --input or --input-keys"
            )
        counts = {"units": self._units, "units_hit": self._hits, "share_hit": self._hits / self._units}
        return counts | ({"rejected": source.rejected} if isinstance(source, InputDocuments) else {})

    def _look(self, block: Block, lines: IO[bytes], clean: IO[bytes] | None) -> None:
        hits, of_files = self._ngrams.hits(block.texts, block.units)
        for hit in hits:
            lines.write(orjson.dumps(block.name(hit.unit) | self._described(hit)) + b"\n")
        self._units += block.count
        self._hits += len(hits)
        self._file_hits += of_files
        hit_units = [hit.unit for hit in hits]
        if block.file is None:
            self._numbers.append(np.array(hit_units, dtype=np.int64) + block.first_unit)
        if clean is not None:
            dropped = set(hit_units)
            clean.writelines(line + b"\n" for unit, line in enumerate(block.originals) if unit not in dropped)

    def _described(self, hit: Hit) -> dict:
        path = self._evaluation.files[hit.file]
        return {"evaluation": path, "evaluation_line": hit.line, "ngram": hit.ngram, "shared_ngrams": hit.shared}

    def evaluation_record(self) -> list[dict]:
        """For each evaluation file its digest, counts and hits."""
        text = self._evaluation
        columns = zip(
            text.files, text.records, text.left_out, self._ngrams.ngrams, self._file_hits.tolist(), strict=True
        )
        return [
            {"file": file, "sha256": sha256_file(file), "records": records, "records_left_out": left_out,
             "ngrams": ngrams, "units_hit": hits}
            for file, records, left_out, ngrams, hits in columns
        ]  # fmt: skip

    def write_rest(self, evaluation: list[dict]) -> dict:
        """Write the numbers of hit units and the subset of the others; returns what to record of it."""
        settings = self._settings
        if settings.corpus is None:
            if not settings.drop:
                return {}
            documents = self._units - self._hits
            return {"clean": {"file": CLEAN, "documents": documents, "sha256": sha256_file(self._folder / CLEAN)}}
        hit = np.concatenate(self._numbers)
        with atomic_file(self._folder / NUMBERS) as stream:
            np.save(stream, hit)
        if not settings.drop:
            return {}
        kept = np.ones(self._units, dtype=bool)
        kept[hit] = False
        policy = {"name": "decontaminate", "ngram": settings.ngram, "shortest": settings.least_words}
        policy |= {"json_keys": list(settings.json_keys), "evaluation": [one["sha256"] for one in evaluation]}
        extra = {"evaluation": [{name: one[name] for name in ("file", "sha256", "units_hit")} for one in evaluation]}
        prefix = write_subset(
            settings.corpus, np.flatnonzero(kept), settings.output, label="clean", policy=policy, extra=extra
        )
        return {"subset": os.path.basename(prefix)}


def _check(settings: DecontaminationSettings) -> None:
    if (settings.corpus is None) == (not settings.inputs):
        raise ValueError("found --corpus and --input, or neither, expected one of them: change --corpus or --input")
    if settings.ngram < 1:
        raise ValueError(f"found --ngram {settings.ngram}, expected 1 or more: change --ngram")
    if not 1 <= settings.least_words <= settings.ngram:
        raise ValueError(
            f"found --shortest {settings.shortest}, expected 1 to {settings.ngram} (--ngram): change --shortest"
        )
    if settings.corpus is None and settings.tokenizer_model:
        raise ValueError("found --tokenizer-model for raw text, expected it with --corpus only: leave it out")
    if (Path(settings.output) / RECORD).exists():
        raise ValueError(f"found {Path(settings.output) / RECORD}, expected a folder without a result: change --output")
