"""Words of a text, such that case, punctuation, line breaks and the form of a character make no difference."""

from __future__ import annotations

import functools
import sys
import unicodedata

import numpy as np

SPACE = np.uint32(ord(" "))
ASCII = bytes(ord(chr(byte).lower()) if byte < 128 and chr(byte).isalnum() else ord(" ") for byte in range(256))
"""For bytes.translate: letters in lower case and digits stay, all else becomes a space."""


def words_of(text: str) -> list[str]:
    """The words of a text, in order: NFKC-normalised and casefolded, split at all but letters, numbers and marks.

    Casefolding can undo the normal form, so the text is normalised once more after it.
    """
    if text.isascii():
        return text.encode().translate(ASCII).decode().split()
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return np.where(_is_of_words()[codes], codes, SPACE).tobytes().decode("utf-32-le").split()


@functools.cache
def _is_of_words() -> np.ndarray:
    """bool [1,114,112]: whether a character (by its code point) is a letter, number or combining mark."""
    return np.array([unicodedata.category(chr(code))[0] in "LMN" for code in range(sys.maxunicode + 1)])
