"""Documents as the tokens that are stored or scored of them; those that cannot be used are set aside with a reason."""

from __future__ import annotations

import numpy as np

from megatron_bliss.data.indexed import token_dtype
from megatron_bliss.data.ingest.documents import Documents
from megatron_bliss.data.ingest.encoding import make_encoder
from megatron_bliss.data.tokenizers import Tokenizer


class DocumentTokens:
    """Tokenises documents; ``dtype`` is that of a corpus of this vocabulary.

    longest: tokens of a document at most, its EOD included (None: no limit); ends_documents: each gets an EOD.
    """

    def __init__(
        self, tokenizer: Tokenizer, backend: str, *, ends_documents: bool = False, longest: int | None = None
    ) -> None:
        self._tokenizer, self._encoder = tokenizer, make_encoder(tokenizer, backend)
        self._ends_documents, self._longest = ends_documents, longest and longest - ends_documents
        self.dtype = token_dtype(tokenizer.vocab_size)

    @property
    def warning(self) -> str | None:
        """What there is to say of the library that is used, so far."""
        return self._encoder.warning

    def of(self, found: Documents) -> tuple[np.ndarray, np.ndarray, Documents]:
        """Tokens [t] one after another and lengths int64 [n] of the documents that can be used, and those documents."""
        tokens, lengths = self._encoder.encode(found.texts)
        bad = unusable(tokens, lengths, self._tokenizer.vocab_size, self._longest)
        if bad:
            keep = np.ones(len(lengths), bool)
            keep[list(bad)] = False
            tokens, lengths, found = tokens[np.repeat(keep, lengths)], lengths[keep], found.without(bad)
        tokens = tokens.astype(self.dtype)
        if self._ends_documents:
            tokens, lengths = with_eod(tokens, lengths, self._tokenizer.eod)
        return tokens, lengths, found


def unusable(tokens: np.ndarray, lengths: np.ndarray, vocab_size: int, longest: int | None) -> dict[int, str]:
    """Why documents cannot be stored, by their place: no token, too many (longest: None for no limit), unknown ids."""
    bad = {int(index): "text without a token" for index in np.flatnonzero(lengths == 0)}
    if longest is not None:
        for index in np.flatnonzero(lengths > longest):
            bad[int(index)] = f"a document of {lengths[index]} tokens, expected at most {longest}"
    if len(tokens) and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0):
        places = np.flatnonzero((tokens >= vocab_size) | (tokens < 0))
        owners = np.searchsorted(np.cumsum(lengths), places, side="right")
        for index, place in zip(owners[::-1].tolist(), places[::-1].tolist(), strict=True):  # the first one stays
            bad[index] = f"token id {tokens[place]} outside the vocabulary of {vocab_size}"
    return bad


def with_eod(tokens: np.ndarray, lengths: np.ndarray, eod: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and lengths with one EOD at the end of every document."""
    out = np.empty(len(tokens) + len(lengths), tokens.dtype)
    ends = np.cumsum(lengths) + np.arange(len(lengths))
    inside = np.ones(len(out), bool)
    inside[ends] = False
    out[inside] = tokens
    out[ends] = eod
    return out, lengths + 1
