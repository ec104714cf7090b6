"""Tokenizers behind one small interface: Hugging Face ``tokenizer.json``, SentencePiece ``.model``, plain bytes.

Text is encoded as it stands: no beginning-of-text token, no truncation, no padding.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from megatron_bliss.base.files import sha256_file

EOD_CANDIDATES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
NUM_BYTES = 256


class Tokenizer(ABC):
    """Text to token ids and back.

    ``kind`` (huggingface, sentencepiece, bytes), ``path`` (None for bytes), ``sha256`` of the file, ``vocab_size``
    (largest id + 1) and ``eod``, the id that ends a document.
    """

    kind: str
    path: str | None
    sha256: str
    vocab_size: int
    eod: int

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens added."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; ids that are no text of their own (half a character) become U+FFFD."""

    def identity(self) -> dict:
        """What a manifest records; all but ``file`` decides whether two corpora share a tokenizer."""
        return {
            "kind": self.kind,
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "eod": self.eod,
            "file": self.path and os.path.abspath(self.path),
        }


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` through the tokenizers library."""

    kind = "huggingface"

    def __init__(self, path: str, eod_token: str | None) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises bare Exception for whatever is wrong with a file
            raise ValueError(
                f"{path} is not a Hugging Face tokenizer.json ({error}); change --tokenizer-model or --tokenizer-type"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"{path} has an empty vocabulary, expected a trained tokenizer: change --tokenizer-model")
        self.path, self.sha256, self.vocab_size = path, sha256_file(path), max(vocabulary.values()) + 1
        candidates = [eod_token] if eod_token else EOD_CANDIDATES
        self.eod = next((vocabulary[token] for token in candidates if token in vocabulary), -1)
        if self.eod < 0:
            added = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
            raise _no_eod(path, candidates, f"its special tokens are {', '.join(added[:20]) or 'none'}")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def added_tokens(self) -> list[str]:
        """Tokens that are found in a text before it is split into words, special ones among them."""
        return [token.content for _, token in sorted(self._tokenizer.get_added_tokens_decoder().items())]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model``."""

    kind = "sentencepiece"

    def __init__(self, path: str, eod_token: str | None) -> None:
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{path} is not a SentencePiece model ({error}); change --tokenizer-model or --tokenizer-type"
            ) from error
        self.path, self.sha256, self.vocab_size = path, sha256_file(path), self._processor.vocab_size()
        self.eod = self._find_eod(eod_token)

    def _find_eod(self, eod_token: str | None) -> int:
        if eod_token is None:
            if self._processor.eos_id() < 0:
                raise _no_eod(self.path, ["its end-of-sentence piece"], "it was trained without one (eos_id -1)")
            return self._processor.eos_id()
        piece = self._processor.piece_to_id(eod_token)
        if piece == self._processor.unk_id():
            raise _no_eod(self.path, [eod_token], "that piece is unknown to it")
        return piece

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(token) for token in ids])


class BytesTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 and one EOD: 257 ids, no file."""

    kind = "bytes"

    def __init__(self) -> None:
        self.path, self.vocab_size, self.eod = None, NUM_BYTES + 1, NUM_BYTES
        self.sha256 = hashlib.sha256(b"utf-8 bytes 0-255, end of document 256").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(token) for token in ids if token < NUM_BYTES).decode("utf-8", errors="replace")


KINDS = {
    "huggingface": HuggingFaceTokenizer,
    "sentencepiece": SentencePieceTokenizer,
    "bytes": BytesTokenizer,
    # Megatron's --tokenizer-type for the same
    "HuggingFaceTokenizer": HuggingFaceTokenizer,
    "SentencePieceTokenizer": SentencePieceTokenizer,
    "GPTSentencePieceTokenizer": SentencePieceTokenizer,
}


def load_tokenizer(kind: str, path: str | os.PathLike | None = None, *, eod_token: str | None = None) -> Tokenizer:
    """Load a tokenizer: kind as in :data:`KINDS`, its file (a folder with ``tokenizer.json`` will do), its EOD token.

    Raises ValueError for an unknown kind, a file of the wrong kind, or no EOD token; FileNotFoundError for no file.
    """
    if kind not in KINDS:
        raise ValueError(
            f"unknown tokenizer type {kind!r}, expected one of {', '.join(KINDS)}: change --tokenizer-type"
        )
    if KINDS[kind] is BytesTokenizer:
        return BytesTokenizer()
    if not path:
        raise ValueError(f"tokenizer type {kind} needs a file: give --tokenizer-model")
    path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; change --tokenizer-model")
    return KINDS[kind](str(path), eod_token)


def load_recorded_tokenizer(identity: dict | None, path: str | os.PathLike | None = None) -> Tokenizer:
    """The tokenizer a manifest names, from ``path`` or from where it was; ValueError when the file is another one."""
    if identity is None:
        raise ValueError("the corpus does not say which tokenizer made it: give --tokenizer-type and --tokenizer-model")
    tokenizer = load_tokenizer(identity["kind"], path or identity["file"])
    if tokenizer.sha256 != identity["sha256"]:
        raise ValueError(
            f"{tokenizer.path} has digest {tokenizer.sha256[:12]}, but the corpus was made with "
            f"{identity['sha256'][:12]}: give its file with --tokenizer-model"
        )
    return tokenizer


def _no_eod(path: str, candidates: Sequence[str], found: str) -> ValueError:
    return ValueError(
        f"{path} has no end-of-document token: looked for {', '.join(candidates)}; {found}; give --eod-token"
    )
