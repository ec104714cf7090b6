"""Rows of a task's data file: what is accepted, and the one shape that a task's definition and checksum are made for.

Two spellings are accepted wherever public copies differ: the fields of the Hugging Face data set that lm-eval reads,
and flat ones; ``docs/evaluation.md`` lists both. A reader raises KeyError, TypeError or ValueError for other rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Row = dict[str, object]


def _text(row: Row, *names: str) -> Row:
    """These fields, which must be strings."""
    for name in names:
        if not isinstance(row[name], str):
            raise TypeError(f"field {name!r} holds {row[name]!r}, expected a string")
    return {name: row[name] for name in names}


def _index(value: object, size: int) -> int:
    number = int(value)
    if not 0 <= number < size:
        raise ValueError(f"answer {number}, expected 0 to {size - 1}")
    return number


def _texts(values: object, name: str) -> list[str]:
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(v, str) and v for v in values):
        raise TypeError(f"field {name!r} holds {values!r}, expected a list of at least two non-empty strings")
    return values


def _choices(row: Row) -> Row:
    """``choices`` as {"text", "label"} with ``answerKey`` (Hugging Face), or as a list with ``gold`` or a letter."""
    choices = row["choices"]
    if isinstance(choices, dict):
        texts, labels = _texts(choices["text"], "choices.text"), choices["label"]
        return {"choices": texts, "gold": labels.index(row["answerKey"].strip())}
    texts = _texts(choices, "choices")
    gold = row["gold"] if "gold" in row else "ABCDEFGH".index(row["answerKey"].strip())
    return {"choices": texts, "gold": _index(gold, len(texts))}


def sciq(row: Row) -> Row:
    """A question with its support, the right answer and three others."""
    return _text(row, "question", "support", "distractor1", "distractor2", "distractor3", "correct_answer")


def arc(row: Row) -> Row:
    """A question and three to five choices."""
    return _text(row, "question") | _choices(row)


def openbookqa(row: Row) -> Row:
    """The start of a sentence and four ends."""
    return _text(row, "question_stem") | _choices(row)


def logiqa(row: Row) -> Row:
    """A passage, a question and four options; the label is a letter."""
    options = _texts(row["options"], "options")
    gold = "abcd".index(row["label"].strip())
    return _text(row, "context", "question") | {"options": options, "gold": _index(gold, len(options))}


def boolq(row: Row) -> Row:
    """A passage and a question of yes (1) or no (0); the answer is ``label``, or ``answer`` as true or false."""
    answer = row["label"] if "label" in row else row["answer"]
    return _text(row, "passage", "question") | {"label": _index(answer, 2)}


def hellaswag(row: Row) -> Row:
    """The start of a scene and four ends, cleaned of its source's marks as lm-eval does it.

    Hugging Face: activity_label, ctx_a, ctx_b, endings, label. Already cleaned: query, choices, gold.
    """
    if "query" in row:
        choices = _texts(row["choices"], "choices")
        return _text(row, "query") | {"choices": choices, "gold": _index(row["gold"], len(choices))}
    parts = _text(row, "activity_label", "ctx_a", "ctx_b")
    query = f"{parts['activity_label']}: {parts['ctx_a']} {parts['ctx_b'].capitalize()}"
    choices = [_without_marks(ending) for ending in _texts(row["endings"], "endings")]
    return {"query": _without_marks(query), "choices": choices, "gold": _index(row["label"], len(choices))}


def _without_marks(text: str) -> str:
    """WikiHow's [title] ends a sentence; other bracketed marks vanish."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def piqa(row: Row) -> Row:
    """A goal and two solutions; label 0 or 1."""
    return _text(row, "goal", "sol1", "sol2") | {"label": _index(row["label"], 2)}


def winogrande(row: Row) -> Row:
    """A sentence with a gap ``_`` and two words for it; the answer is "1" or "2"."""
    fields = _text(row, "sentence", "option1", "option2", "answer")
    if "_" not in fields["sentence"] or fields["answer"] not in ("1", "2"):
        raise ValueError(f"found {fields}, expected a sentence with a gap _ and the answer '1' or '2'")
    return fields


def lambada(row: Row) -> Row:
    """A passage whose last word, after its last space, is to be told."""
    if " " not in row["text"]:
        raise ValueError("the text has no space, expected at least two words")
    return _text(row, "text")


def last_word(row: Row) -> Row:
    """A text whose last whitespace-separated word is to be told."""
    words = _text(row, "text")["text"].rsplit(maxsplit=1)
    if len(words) < 2:
        raise ValueError(f"the text is {row['text']!r}, expected at least two words")
    return {"context": words[0], "word": " " + words[1]}


def choice(row: Row) -> Row:
    """A query and what may follow it after a space; ``answer`` counts from 0."""
    choices = _texts(row["choices"], "choices")
    return _text(row, "query") | {"choices": choices, "gold": _index(row["answer"], len(choices))}


def digested(row: Row) -> Row:
    """What the checksum sees: SciQ's wrong answers have no order that matters."""
    if "distractor1" not in row:
        return row
    wrong = sorted(row[f"distractor{number}"] for number in (1, 2, 3))
    return {**row, "distractor1": wrong[0], "distractor2": wrong[1], "distractor3": wrong[2]}


READERS: dict[str, Callable[[Row], Row]] = {
    "sciq": sciq,
    "arc_easy": arc,
    "arc_challenge": arc,
    "logiqa": logiqa,
    "openbookqa": openbookqa,
    "boolq": boolq,
    "hellaswag": hellaswag,
    "piqa": piqa,
    "winogrande": winogrande,
    "lambada_openai": lambada,
}
"""Task -> reader of one row."""
USER_READERS = {"last_word": last_word, "choice": choice}
"""Kind of a user's own task, from its file's name -> reader of one row."""
