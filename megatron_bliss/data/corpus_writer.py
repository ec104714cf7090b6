"""Units streamed into a new ``.bin``/``.idx`` pair."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from pathlib import Path

import numpy as np

from megatron_bliss.base.files import DigestWriter, publish
from megatron_bliss.data.indexed import token_dtype, write_index


class CorpusWriter:
    """Streams units into ``X.bin`` and writes ``X.idx`` at the end; both appear under their names only when complete.

    Memory: 4 bytes per unit. Use as a context manager: leaving it without an error publishes the pair, and
    ``bin_sha256``, ``index_sha256``, ``bin_bytes`` and ``num_tokens`` are then set; an error removes what was written.
    """

    def __init__(self, prefix: str | os.PathLike, vocab_size: int) -> None:
        self.prefix, self.vocab_size, self.dtype = str(prefix), vocab_size, token_dtype(vocab_size)
        self.num_tokens = self.bin_bytes = 0
        self.bin_sha256 = self.index_sha256 = ""
        self.index_crc32 = 0
        self._lengths: list[np.ndarray] = []
        self._digest = hashlib.sha256()
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(f"{self.prefix}.bin.tmp", "ab")  # noqa: SIM115 - lives as long as the writer
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._stream.close()
            raise ValueError(
                f"{self.prefix}.bin.tmp is being written by another process; wait for it to end"
            ) from error
        self._stream.truncate(0)

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append units: their tokens one after another, and their lengths in tokens."""
        tokens, lengths = np.asarray(tokens), np.asarray(lengths, dtype=np.int64)
        if int(lengths.sum()) != len(tokens) or (len(lengths) and lengths.min() < 0):
            raise ValueError(f"{len(tokens)} tokens, but lengths that sum to {lengths.sum()}")
        if len(lengths) and lengths.max() > np.iinfo(np.int32).max:
            raise ValueError(f"a unit of {lengths.max()} tokens, but the index holds at most 2**31 - 1: cut it")
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < self.vocab_size):
            raise ValueError(
                f"token ids from {tokens.min()} to {tokens.max()}, but the vocabulary ends at {self.vocab_size - 1}: "
                "the tokenizer file does not fit its own ids"
            )
        data = np.ascontiguousarray(tokens, dtype=self.dtype.newbyteorder("<"))
        self._stream.write(data)
        self._digest.update(data)
        self._lengths.append(lengths.astype(np.int32))
        self.num_tokens += len(tokens)

    @property
    def num_units(self) -> int:
        """Units added so far."""
        return sum(map(len, self._lengths))

    def record(self, counts: dict | None = None) -> dict:
        """What a manifest says of the finished pair; ``counts`` are added to units and tokens."""
        return {
            "dtype": self.dtype.name,
            "counts": {"units": self.num_units, "tokens": self.num_tokens, **(counts or {})},
            "index_sha256": self.index_sha256,
            "index_crc32": self.index_crc32,
            "bin_bytes": self.bin_bytes,
            "bin_sha256": self.bin_sha256,
        }

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        try:
            if error_type is None:
                self._finish()
        finally:
            self._stream.close()
            for name in (f"{self.prefix}.bin.tmp", f"{self.prefix}.idx.tmp"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)

    def _finish(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        lengths = np.concatenate([*self._lengths, np.zeros(0, np.int32)])
        with open(f"{self.prefix}.idx.tmp", "wb") as index:
            digests = DigestWriter(index)
            write_index(digests, self.dtype, lengths)
            index.flush()
            os.fsync(index.fileno())
        self.index_sha256, self.index_crc32 = digests.sha256, digests.crc32
        self.bin_sha256, self.bin_bytes = self._digest.hexdigest(), self.num_tokens * self.dtype.itemsize
        publish(f"{self.prefix}.bin.tmp", f"{self.prefix}.bin")
        publish(f"{self.prefix}.idx.tmp", f"{self.prefix}.idx")
