"""Evaluation tasks made from held-out text: a passage's last word is to be told, or what comes next from what does not.

Three kinds, from hard to easy for a small model: ``last_word``, a passage's last word out of all words; ``cloze``, the
same word out of a few that are as long and about as frequent; ``choice``, which words come next. A file
TASK.last_word.jsonl.gz holds {"text": passage}; the others are TASK.choice.jsonl.gz, {"query": context, "choices":
[words, ...], "answer": index of the true ones}. TASK is the name asked for, with the kind behind it where several are
made. ``NAME.tasks.json`` says what they were made from and with which settings. The same text, settings and seed give
the same files, byte for byte.
"""

from __future__ import annotations

import gzip
import itertools
import math
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import orjson

from megatron_bliss.base.files import atomic_file, sha256_file, write_json
from megatron_bliss.data.cloze import bare, is_answer, passages
from megatron_bliss.data.ingest.sources import BadLine, SourceState, expand_inputs, parse_line, read_blocks

KINDS = {"last_word": "last_word", "cloze": "choice", "choice": "choice"}
"""Kind of task -> the middle of its file's name, by which an evaluation knows how to read it."""
USUAL_SHARE = 0.05
"""A word that at least this share of the documents hold can be told without having occurred in the passage."""
MOST_CONTINUATIONS = 400_000
"""Wrong choices are looked for among at most about this many runs of words of the input."""
SEVERAL = -1
NEAREST = 12
"""Wrong choices are drawn from this many continuations whose words are most nearly as frequent as the true ones."""


@dataclass(frozen=True)
class TextTaskSettings:
    """What to make from which text."""

    inputs: Sequence[str]
    """Files, folders or globs of JSON lines, plain or gzipped: documents that no model was trained on."""
    output: str
    """Folder for the task files."""
    name: str
    """The task's name; the first part of it where several kinds are made."""
    kinds: Sequence[str] = tuple(KINDS)
    """Some of last_word, cloze and choice."""
    max_items: int = 1000
    """Most items per task."""
    seed: int = 1234
    """Which items, which wrong choices and where the true one stands."""
    json_keys: Sequence[str] = ("text",)
    """Keys that hold the text; several are joined by a newline."""
    min_words: int = 16
    """Fewest words of a cloze passage."""
    max_words: int = 48
    """Most words of a cloze passage."""
    context_words: int = 16
    """Words before the choice."""
    continuation_words: int = 2
    """Words to choose."""
    num_choices: int = 4
    """Choices per item, the true one among them."""


class Window(NamedTuple):
    """A run of words and what follows it: ``rarity`` is the sum of -log frequency over the continuation."""

    document: int
    context: str
    continuation: str
    rarity: float


def make_text_tasks(settings: TextTaskSettings) -> dict:
    """Write the tasks; returns the content of ``NAME.tasks.json``. ValueError where the text gives no item."""
    _check(settings)
    documents, sources = read_documents(settings.inputs, settings.json_keys)
    tasks = {}
    for kind in settings.kinds:
        items = MAKERS[kind](documents, settings)
        if not items:
            raise ValueError(
                f"found no {kind} item in {len(documents):,} documents, expected running prose in words separated by "
                "spaces: give more text, or shorter passages (--context-words, --min-words)"
            )
        task = f"{settings.name}_{kind}" if len(settings.kinds) > 1 else settings.name
        path = Path(settings.output) / f"{task}.{KINDS[kind]}.jsonl.gz"
        write_items(path, items)
        chance = {"chance": 1 / settings.num_choices} if "choices" in items[0] else {}
        tasks[task] = {"kind": kind, "file": path.name, "items": len(items), **chance, "sha256": sha256_file(path)}
    options = {key: value for key, value in asdict(settings).items() if key not in ("inputs", "output")}
    options |= {"kinds": list(settings.kinds), "json_keys": list(settings.json_keys)}
    record = {"format": 1, "tasks": tasks, "documents": len(documents), "sources": sources, "settings": options}
    write_json(Path(settings.output) / f"{settings.name}.tasks.json", record)
    return record


def read_documents(inputs: Sequence[str], json_keys: Sequence[str] = ("text",)) -> tuple[list[str], list[dict]]:
    """Texts of all documents, and {file, bytes, sha256} of the files. ValueError for a line that is no document."""
    documents, sources = [], []
    for file in expand_inputs(inputs):
        state = SourceState(file)
        for block in read_blocks(state):
            if block.damage:
                raise ValueError(f"{file}: {block.damage}")
            for number, line in block.lines():
                try:
                    documents.append(parse_line(line, json_keys)[0])
                except BadLine as error:
                    raise ValueError(
                        f"{file}, line {number}: {error}, expected a document: mend the line or change --json-keys"
                    ) from error
        sources.append(state.record() | {"file": Path(file).name})
    return documents, sources


def last_word_items(documents: Sequence[str], settings: TextTaskSettings) -> list[dict]:
    """Passages whose last word occurred before; where those are too few, also such as end in a usual word."""
    return [{"text": f"{window.context} {window.continuation}"} for window in _passages(documents, settings)]


def cloze_items(documents: Sequence[str], settings: TextTaskSettings) -> list[dict]:
    """The same passages, their last word among others of as many letters and about as frequent."""
    generator = random.Random(f"{settings.seed} cloze")
    rarities = _rarities(map(bare, text.split()) for text in documents)
    pool: dict[int, list[Window]] = {}
    for word in sorted((w for w in rarities if is_answer(w, (), rarities)), key=lambda word: (rarities[word], word)):
        pool.setdefault(len(word), []).append(Window(SEVERAL, "", word, rarities[word]))
    made = (
        _item(
            window._replace(rarity=rarities[window.continuation]),
            pool.get(len(window.continuation), []),
            settings.num_choices,
            generator,
        )
        for window in _passages(documents, settings)
    )
    return [item for item in made if item]


def _passages(documents: Sequence[str], settings: TextTaskSettings) -> list[Window]:
    """Passages and their last words in random order, without rarities."""
    generator = random.Random(f"{settings.seed} passages")
    usual = _usual_words(documents)
    found: dict[bool, dict[str, Window]] = {True: {}, False: {}}
    for number, text in enumerate(documents):
        for passage in passages(text, settings.min_words, settings.max_words, usual):
            context, _, answer = passage.rpartition(" ")
            has_occurred = answer in map(bare, context.split())
            found[has_occurred].setdefault(passage, Window(number, context, answer, 0.0))
    chosen: list[Window] = []
    for group in (list(found[True].values()), list(found[False].values())):
        chosen += generator.sample(group, min(len(group), settings.max_items - len(chosen)))
    generator.shuffle(chosen)
    return chosen


def _usual_words(documents: Sequence[str]) -> frozenset[str]:
    """Words that a twentieth of the documents hold."""
    counts = Counter(word for text in documents for word in {bare(word) for word in text.split()})
    least = max(2, USUAL_SHARE * len(documents))
    return frozenset(word for word, count in counts.items() if count >= least)


def choice_items(documents: Sequence[str], settings: TextTaskSettings) -> list[dict]:
    """Contexts with the words that follow and wrong choices that a model without context can't tell from them.

    A wrong choice is a run of words of another document with as many characters (so that accuracy with and without
    length normalisation is the same) and words about as frequent, taken from the middle of running text as the true
    one is. What is left to go by is how well it continues the context.
    """
    generator = random.Random(f"{settings.seed} choice")
    rarities = _rarities(text.split() for text in documents)
    size = settings.context_words + settings.continuation_words
    items = [*_windows(documents, settings, rarities, size)]
    generator.shuffle(items)
    pool = _continuations(documents, settings, rarities)
    made = (_item(window, pool.get(len(window.continuation), []), settings.num_choices, generator) for window in items)
    return list(itertools.islice((item for item in made if item), settings.max_items))


def _continuations(
    documents: Sequence[str], settings: TextTaskSettings, rarities: dict[str, float]
) -> dict[int, list[Window]]:
    """Different continuations by number of characters, in order of rarity; the document is -1 for those of several."""
    positions = sum(len(text.split()) for text in documents)
    found: dict[str, Window] = {}
    for window in _windows(documents, settings, rarities, max(1, math.ceil(positions / MOST_CONTINUATIONS))):
        first = found.setdefault(window.continuation, window)
        if first.document != window.document:
            found[window.continuation] = first._replace(document=SEVERAL)
    pool: dict[int, list[Window]] = {}
    for window in sorted(found.values(), key=lambda window: (window.rarity, window.continuation)):
        pool.setdefault(len(window.continuation), []).append(window)
    return pool


def _rarities(documents: Iterable[Iterable[str]]) -> dict[str, float]:
    """-log of the share of every word."""
    counts = Counter(itertools.chain.from_iterable(documents))
    total = counts.total()
    return {word: -math.log(count / total) for word, count in counts.items()}


def _windows(
    documents: Sequence[str], settings: TextTaskSettings, rarities: dict[str, float], stride: int
) -> Iterator[Window]:
    """Windows of every paragraph, their beginnings ``stride`` words apart."""
    size = settings.context_words + settings.continuation_words
    for number, text in enumerate(documents):
        for paragraph in text.split("\n\n"):
            words = paragraph.split()
            for start in range(0, len(words) - size + 1, stride):
                context = words[start : start + settings.context_words]
                rest = words[start + settings.context_words : start + size]
                yield Window(number, " ".join(context), " ".join(rest), sum(rarities[word] for word in rest))


def _item(window: Window, pool: Sequence[Window], num_choices: int, generator: random.Random) -> dict | None:
    """One item; None where there are too few wrong choices of the same length. ``pool`` is in order of rarity."""
    wrong = list(itertools.islice(_nearest(window, pool), NEAREST))
    if len(wrong) < num_choices - 1:
        return None
    choices = generator.sample(wrong, num_choices - 1)
    answer = generator.randrange(num_choices)
    choices.insert(answer, window.continuation)
    return {"query": window.context, "choices": choices, "answer": answer}


def _nearest(window: Window, pool: Sequence[Window]) -> Iterator[str]:
    """Different continuations of other documents, the most nearly as rare ones first."""
    above = bisect_left(pool, window.rarity, key=lambda other: other.rarity)
    below = above - 1
    while below >= 0 or above < len(pool):
        gap_above = pool[above].rarity - window.rarity if above < len(pool) else math.inf
        gap_below = window.rarity - pool[below].rarity if below >= 0 else math.inf
        if gap_above <= gap_below:
            other, above = pool[above], above + 1
        else:
            other, below = pool[below], below - 1
        if other.document != window.document and other.continuation != window.continuation:
            yield other.continuation


MAKERS = {"last_word": last_word_items, "cloze": cloze_items, "choice": choice_items}


def write_items(path: Path | str, items: Iterable[dict]) -> None:
    """Write gzipped JSON lines, the same bytes every time."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_file(path) as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=6, mtime=0) as stream,
    ):
        for item in items:
            stream.write(orjson.dumps(item) + b"\n")


def _check(settings: TextTaskSettings) -> None:
    unknown = [kind for kind in settings.kinds if kind not in KINDS]
    if unknown or not settings.kinds:
        raise ValueError(f"found --kind {', '.join(unknown) or 'none'}, expected some of {', '.join(KINDS)}")
    if not settings.name or any(mark in settings.name for mark in "./\\"):
        raise ValueError(f"found --name {settings.name!r}, expected a word without dots and slashes")
    least = {"max_items": 1, "min_words": 2, "context_words": 1, "continuation_words": 1, "num_choices": 2}
    for option, bound in least.items():
        if getattr(settings, option) < bound:
            raise ValueError(
                f"found --{option.replace('_', '-')} {getattr(settings, option)}, expected {bound} or more"
            )
    if settings.max_words < settings.min_words:
        raise ValueError(f"found --max-words {settings.max_words} below --min-words {settings.min_words}: raise it")
