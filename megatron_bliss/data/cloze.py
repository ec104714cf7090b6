"""Last-word cloze passages made from prose, in the manner of LAMBADA: {text}, whose last word is to be predicted."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

FEWEST_WORDS, MOST_WORDS = 40, 80
FEWEST_LETTERS = 4
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
SAYS_LITTLE = "this that these those with from into only also then than when which used have been will them they"
EMPTY_ANSWERS = frozenset(SAYS_LITTLE.split())


def passages(
    text: str, fewest: int = FEWEST_WORDS, most: int = MOST_WORDS, usual: Collection[str] = frozenset()
) -> Iterator[str]:
    """Runs of whole sentences, ``fewest`` to ``most`` words, whose last word can be told: see :func:`is_answer`.

    The full stop after it is dropped. Passages do not overlap.
    """
    words: list[str] = []
    for sentence in SENTENCE_END.split(text):
        words += sentence.split()
        if len(words) > most:
            words = []
        elif len(words) >= fewest:
            answer = words[-1].rstrip(".!?")
            if is_answer(answer, words[:-1], usual):
                yield " ".join([*words[:-1], answer])
                words = []


def is_answer(word: str, context: Sequence[str], usual: Collection[str] = frozenset()) -> bool:
    """Whether a word is plain, lower-case, says something, and has occurred in its context or is a ``usual`` one."""
    plain = len(word) >= FEWEST_LETTERS and word.isalpha() and word == word.lower() and word not in EMPTY_ANSWERS
    return plain and (word in usual or word in {bare(other) for other in context})


def bare(word: str) -> str:
    """A word without the punctuation around it, in lower case."""
    return word.strip(".,;:!?()\"'").lower()
