"""Last-word cloze passages made from prose, in the manner of LAMBADA: {text}, whose last word is to be predicted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

FEWEST_WORDS, MOST_WORDS = 40, 80
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
PLAIN_WORD = re.compile(r"[a-z]{4,}")
SAYS_LITTLE = "this that these those with from into only also then than when which used have been will them they"
EMPTY_ANSWERS = frozenset(SAYS_LITTLE.split())


def passages(text: str) -> Iterator[str]:
    """Runs of whole sentences, 40 to 80 words, whose last word is plain and lower-case and has occurred before.

    The full stop after it is dropped. Passages do not overlap.
    """
    words: list[str] = []
    for sentence in SENTENCE_END.split(text):
        words += sentence.split()
        if len(words) > MOST_WORDS:
            words = []
        elif len(words) >= FEWEST_WORDS:
            answer = words[-1].rstrip(".!?")
            if is_answer(answer, words[:-1]):
                yield " ".join([*words[:-1], answer])
                words = []


def is_answer(word: str, context: Sequence[str]) -> bool:
    """Whether a word can be predicted from its context: it has occurred in it and says something."""
    return (
        PLAIN_WORD.fullmatch(word) is not None
        and word not in EMPTY_ANSWERS
        and word in {other.strip(".,;:!?()\"'").lower() for other in context}
    )
