"""Which tokens of a validation text are to be predicted: the last word, the answer to a question, or all of them.

A *labelled unit* is (token ids, number of the first labelled token); the labels go from there to the unit's end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import orjson

from megatron_bliss.data.ingest.sources import BadLine, parse_line
from megatron_bliss.data.tokenizers import Tokenizer

LabelledUnit = tuple[list[int], int]


def label_line(
    line: bytes, label: str, json_keys: Sequence[str], tokenizer: Tokenizer, max_length: int
) -> list[LabelledUnit]:
    """Units of one JSON line. Raises BadLine."""
    if label in ("answer", "item"):
        context, answer = context_and_answer(_item(line))
        text = f"{context}{answer}"
        if label == "item":
            return label_all(tokenizer.encode_batch([text])[0], max_length)
        return label_ending(tokenizer.encode_batch([text])[0], answer.strip(), tokenizer, max_length)
    text, _ = parse_line(line, json_keys)
    if label == "all":
        return label_all(tokenizer.encode_batch([text])[0], max_length)
    text = text.rstrip()
    return label_ending(tokenizer.encode_batch([text])[0], last_word(text), tokenizer, max_length)


def last_word(text: str) -> str:
    """The last word of a passage, which must hold more than that."""
    word = text.split()[-1]
    if word == text.strip():
        raise BadLine("a single word, expected a passage before it")
    return word


def label_ending(ids: list[int], ending: str, tokenizer: Tokenizer, max_length: int) -> list[LabelledUnit]:
    """One unit for a text that ends with what is to be told; its beginning may be cut.

    The label is the shortest run of last tokens whose text ends with all of ``ending``, so it is right wherever the
    tokenizer puts word boundaries and spaces. Neither must end with white space. Raises BadLine.
    """
    start = len(ids) - 1
    while start > 0 and not tokenizer.decode(ids[start:]).endswith(ending):
        start -= 1
    if start <= 0:
        raise BadLine(f"the tokenizer does not give back the ending {ending[:80]!r} with something before it")
    cut = max(0, len(ids) - max_length)
    if start <= cut:
        raise BadLine(f"the ending takes {len(ids) - start} tokens, expected fewer than the {max_length} of a unit")
    return [(ids[cut:], start - cut)]


def label_all(ids: list[int], max_length: int) -> list[LabelledUnit]:
    """Units of a text judged by all its tokens but the first of each piece: pieces of ``max_length``."""
    pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    units = [(piece, 1) for piece in pieces if len(piece) >= 2]
    if not units:
        raise BadLine("fewer than two tokens")
    return units


# -- task files -------------------------------------------------------------------------------------------------------


def context_and_answer(record: dict) -> tuple[str, str]:
    """(what is given, the right answer) of an item of a task file, as text that follows one another.

    The shapes are those of LAMBADA, SciQ, BoolQ, ARC, OpenBookQA, LogiQA, HellaSwag, PIQA, WinoGrande, and prompt with
    completion; the wording is that of the usual zero-shot prompts. Text alone is judged by its last word. Raises
    BadLine.
    """
    for keys, read in SHAPES.items():
        if all(key in record for key in keys):
            try:
                context, answer = read(record)
            except (TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
                raise BadLine(f"{', '.join(keys)} are not what they should be: {error}") from error
            if not context.strip() or not answer.strip():
                raise BadLine("no text before the answer" if answer.strip() else "an empty answer")
            return context, answer.rstrip()
    known = "; ".join(" + ".join(keys) for keys in SHAPES)
    raise BadLine(f"an item with {', '.join(list(record)[:10]) or 'no keys'}, expected one of: {known}")


def _item(line: bytes) -> dict:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadLine(f"broken JSON: {error}") from error
    if not isinstance(record, dict):
        raise BadLine(f"a JSON {type(record).__name__}, expected an object")
    return record


def _pick(choices: Sequence[str] | dict, key: int | str, first: int = 0) -> str:
    """The right one of several choices: by number (counted from ``first``), or by letter or name."""
    if isinstance(choices, dict):  # {"text": [...], "label": ["A", ...]}
        return choices["text"][choices["label"].index(key)]
    text = str(key).strip()
    number = int(text) - first if text.lstrip("-").isdigit() else "abcdefgh".index(text.lower())
    if not 0 <= number < len(choices):
        raise IndexError(f"answer {key!r} of {len(choices)} choices")
    return choices[number]


def _question(context: str, question: str) -> str:
    return f"{context}\nQuestion: {question}\nAnswer:".lstrip()


def _of_options(record: dict) -> tuple[str, str]:
    options = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCDEFGH", record["options"], strict=False))
    context = f"Passage: {record['context']}\nQuestion: {record['question']}\nChoices:\n{options}\nAnswer:"
    return context, f" {_pick(record['options'], record['label'])}"


def _of_blank(record: dict) -> tuple[str, str]:
    before, blank, after = record["sentence"].partition("_")
    if not blank:
        raise ValueError("a sentence without a blank")
    return f"{before}{_pick([record['option1'], record['option2']], record['answer'], first=1)}", f" {after.strip()}"


def _of_passage(record: dict) -> tuple[str, str]:
    text = record["text"].rstrip()
    word = last_word(text)
    return text.removesuffix(word), word


SHAPES: dict[tuple[str, ...], Callable[[dict], tuple[str, str]]] = {
    ("context", "target"): lambda item: (item["context"], item["target"]),
    ("prompt", "completion"): lambda item: (item["prompt"], item["completion"]),
    ("question", "correct_answer"): lambda item: (
        _question(item.get("support", ""), item["question"]),
        f" {item['correct_answer']}",
    ),
    ("passage", "question", "label"): lambda item: (
        _question(item["passage"], f"{item['question']}?"),
        f" {_pick(['no', 'yes'], int(item['label']))}",
    ),
    ("question", "choices", "gold"): lambda item: (
        _question("", item["question"]),
        f" {_pick(item['choices'], item['gold'])}",
    ),
    ("question", "choices", "answerKey"): lambda item: (
        _question("", item["question"]),
        f" {_pick(item['choices'], item['answerKey'])}",
    ),
    ("question_stem", "choices", "answerKey"): lambda item: (
        item["question_stem"],
        f" {_pick(item['choices'], item['answerKey'])}",
    ),
    ("context", "question", "options", "label"): _of_options,
    ("query", "choices", "gold"): lambda item: (item["query"], f" {_pick(item['choices'], item['gold'])}"),
    ("ctx", "endings", "label"): lambda item: (item["ctx"], f" {_pick(item['endings'], item['label'])}"),
    ("goal", "sol1", "sol2", "label"): lambda item: (
        _question("", item["goal"]),
        f" {_pick([item['sol1'], item['sol2']], item['label'])}",
    ),
    ("sentence", "option1", "option2", "answer"): _of_blank,
    ("text",): _of_passage,
}
"""Keys by which an item is known -> (what is given, the answer); the first shape whose keys are all there counts."""
