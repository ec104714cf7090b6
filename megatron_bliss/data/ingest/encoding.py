"""Texts to one array of token ids, through the fastest library that gives the tokenizer's own answer.

A Hugging Face ``tokenizer.json`` goes through GigaToken where that can read it and agrees with the tokenizers library
on ``PROBES``. From then on a few documents of every block are encoded by both; at the first difference the block is
done again by the tokenizers library, and so is everything after it in this process.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence

import numpy as np

from megatron_bliss.data.tokenizers import BytesTokenizer, HuggingFaceTokenizer, Tokenizer

CHECKED_SHARE = 1e-3  # of the text is encoded twice; the tokenizers library is about 25 times slower
CHECKED_LENGTH = 1 << 13  # characters of a document that is encoded twice; of longer ones the beginning, by itself
GROWTH_LIMIT = 256 << 20  # bytes; GigaToken's cache of words grows without bound, so it is made anew
PROBES = (
    "The quick brown fox, it's said, jumped 1234567 times over the lazy dogs' bed.",
    "  leading,  double   and trailing spaces  ",
    "lines\n\nand\r\n\ttabs\t\t\n   \n",
    "Über naïve façades: e\u0301 \u00e9 \ufb01 \u212b",
    "日本語のテキスト、한국어 텍스트, русский текст, العربية, हिन्दी",
    "👩‍👩‍👧‍👦 🇩🇪 ½ ™ … “quotes” — dashes",
    "\u00a0\u2003\u200b\u200d\ufeff\u0000\u0007",
    "def f(x):\n    return {'a': [x**2, 0x1F]}  # comment\n",
    "HELLO world'LL he'S I'M we'Ve 'tis",
    "https://example.org/a_b-c?d=1&e=%20#f" + "a" * 300 + "!" * 40,
)


class OwnEncoder:
    """A tokenizer through its own library."""

    warning: str | None = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all texts one after another, integers; and int64[len(texts)], how many each has."""
        documents = self.tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        flat = itertools.chain.from_iterable(documents)
        return np.fromiter(flat, np.int64, int(lengths.sum())), lengths


class BytesEncoder(OwnEncoder):
    """Bytes of UTF-8: nothing but a copy."""

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        documents = [text.encode("utf-8") for text in texts]
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        return np.frombuffer(b"".join(documents), np.uint8), lengths


class GigaTokenEncoder:
    """GigaToken, watched by the tokenizers library."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self.tokenizer, self._own = tokenizer, OwnEncoder(tokenizer)
        self.warning: str | None = None
        self._load()

    def _load(self) -> None:
        import gigatoken

        self._fast = gigatoken.Tokenizer(self.tokenizer.path)
        self._loaded_bytes = _resident_bytes()

    def probe(self) -> bool:
        """Whether it agrees with the tokenizers library on ``PROBES`` and on every added token in a sentence."""
        added = [f"before {token} after{token}" for token in self.tokenizer.added_tokens()[:64]]
        return self._differs([*PROBES, *added], *self._encode([*PROBES, *added])) is None

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`OwnEncoder.encode`."""
        if self.warning:
            return self._own.encode(texts)
        try:
            tokens, lengths = self._encode(texts)
            found = self._check(texts, tokens, lengths)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            found = f"failed ({error})"
        if found:
            self.warning = f"GigaToken {found}: this block and all after it go through Hugging Face tokenizers"
            self._fast = None
            return self._own.encode(texts)
        if _resident_bytes() - self._loaded_bytes > GROWTH_LIMIT:
            self._fast = None
            self._load()
        return tokens, lengths

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        layout = self._fast.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

    def _check(self, texts: Sequence[str], tokens: np.ndarray, lengths: np.ndarray) -> str | None:
        """What is wrong with the tokens, if anything was found."""
        chosen = _sample(texts)
        if chosen or not texts:
            return self._differs(texts, tokens, lengths, chosen)
        beginning = [texts[0][:CHECKED_LENGTH]]  # the tokenizers library takes 200 times a text's size in memory
        return self._differs(beginning, *self._encode(beginning)) or self._differs(texts, tokens, lengths, [])

    def _differs(
        self, texts: Sequence[str], tokens: np.ndarray, lengths: np.ndarray, chosen: Sequence[int] | None = None
    ) -> str | None:
        chosen = range(len(texts)) if chosen is None else chosen
        if len(lengths) != len(texts) or int(lengths.sum()) != len(tokens):
            return f"gave {len(lengths)} documents for {len(texts)}"
        expected = self.tokenizer.encode_batch([texts[index] for index in chosen])
        ends = np.cumsum(lengths)
        for index, ids in zip(chosen, expected, strict=True):
            if tokens[ends[index] - lengths[index] : ends[index]].tolist() != ids:
                return f"differs on a text that begins with {texts[index][:60]!r}"
        return None


def make_encoder(tokenizer: Tokenizer, backend: str = "auto") -> OwnEncoder | GigaTokenEncoder:
    """The encoder of a tokenizer; backend "own" asks for its own library, "auto" for the fastest that agrees."""
    if isinstance(tokenizer, BytesTokenizer):
        return BytesEncoder(tokenizer)
    if backend == "own" or not isinstance(tokenizer, HuggingFaceTokenizer):
        return OwnEncoder(tokenizer)
    own = OwnEncoder(tokenizer)
    try:
        fast = GigaTokenEncoder(tokenizer)
        agrees = fast.probe()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        own.warning = f"GigaToken cannot read {tokenizer.path} ({error}): Hugging Face tokenizers is used, more slowly"
        return own
    if not agrees:
        own.warning = f"GigaToken tokenises otherwise than {tokenizer.path} says: Hugging Face tokenizers is used"
        return own
    return fast


def _sample(texts: Sequence[str]) -> list[int]:
    """Places of the short documents to encode twice: one that is not all ASCII first, up to their share of text."""
    total = sum(map(len, texts))
    order = random.Random(total).sample(range(len(texts)), min(len(texts), 256))
    short = [index for index in order if len(texts[index]) <= CHECKED_LENGTH]
    short.sort(key=lambda index: texts[index].isascii())
    left, chosen = CHECKED_SHARE * total, []
    for index in short[:1] + sorted(short[1:]):
        if chosen and left <= 0:
            break
        chosen.append(index)
        left -= len(texts[index])
    return chosen


def _resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    if not os.path.exists("/proc/self/statm"):
        return 0
    with open("/proc/self/statm", "rb") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
