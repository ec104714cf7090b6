"""Megatron's indexed datasets ``X.bin`` + ``X.idx``: read, validate, write.

The index, little-endian: ``MMIDIDX\\0\\0``, u64 version 1, u8 dtype code, u64 S sequences, u64 D = documents + 1,
int32[S] lengths in tokens, int64[S] pointers in bytes into ``.bin``, int64[D] first sequence of each document with S as
the last entry. A *unit* is one sequence of the index: what is scored and selected.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
TOKEN_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
UINT16_LIMIT = 65500  # megatron-core's own limit in DType.optimal_dtype
RELEASED_BLOCKS = 128  # of an index, after which what was read of it leaves the memory
BLOCK = 1 << 16  # units handled at once where temporaries are made: they stay in the processor's cache


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron stores ids of this vocabulary in: uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < UINT16_LIMIT else np.int32)


def blocks(count: int, size: int = BLOCK) -> Iterator[slice]:
    """Slices that cover ``range(count)`` in order."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class IndexedCorpus:
    """Memory-mapped reader of one ``.bin``/``.idx`` pair.

    ``lengths`` int32[S] (tokens), ``pointers`` int64[S] (bytes) and ``document_indices`` int64[D] are read-only views
    of the mapped index. They are not aligned in memory: copy one before heavy arithmetic on it.

    Raises ValueError when the index is not one or does not fit its ``.bin``; nothing is allocated by what a header
    claims before that claim has been held against the file's size.
    """

    def __init__(self, prefix: str | os.PathLike) -> None:
        self.prefix = str(prefix)
        self.index_path, self.bin_path = f"{self.prefix}.idx", f"{self.prefix}.bin"
        for path in (self.index_path, self.bin_path):
            if os.path.islink(path) and not os.path.exists(path):
                raise FileNotFoundError(
                    f"{path} is a link to {os.readlink(path)}, which is not there; put the corpus back where it was, "
                    "relative to the subset, or make the subset again"
                )
            if not os.path.isfile(path):
                raise FileNotFoundError(
                    f"{path} does not exist; give the prefix of a .bin/.idx pair, without the suffix"
                )
        self._maps: list[mmap.mmap] = []
        self._map_index()
        self._map_tokens()
        self._check_arrays()

    def _map_index(self) -> None:
        size = os.path.getsize(self.index_path)
        if size < HEADER.size:
            raise self._damaged(f"{size} bytes, expected at least the header's {HEADER.size}")
        with open(self.index_path, "rb") as stream:
            magic, version, code, sequences, documents = HEADER.unpack(stream.read(HEADER.size))
        if magic != MAGIC:
            raise self._damaged(f"starts with {magic!r}, expected {MAGIC!r}")
        if version != VERSION:
            raise self._damaged(f"version {version}, expected {VERSION}")
        if code not in TOKEN_DTYPES:
            raise self._damaged(f"dtype code {code}, expected an integer type, one of {sorted(TOKEN_DTYPES)}")
        expected = HEADER.size + 12 * sequences + 8 * documents  # Python integers: no overflow
        if documents < 1 or size not in (expected, expected + sequences):  # one mode byte per sequence may follow
            raise self._damaged(
                f"{size} bytes, but {sequences} sequences and {documents} document entries take {expected}"
            )
        self.dtype = np.dtype(TOKEN_DTYPES[code]).newbyteorder("<")
        buffer = self._mapped(self.index_path, np.dtype(np.uint8))
        lengths_end = HEADER.size + 4 * sequences
        self.lengths = buffer[HEADER.size : lengths_end].view("<i4")
        self.pointers = buffer[lengths_end : lengths_end + 8 * sequences].view("<i8")
        self.document_indices = buffer[lengths_end + 8 * sequences : expected].view("<i8")

    def _map_tokens(self) -> None:
        self.bin_bytes = os.path.getsize(self.bin_path)
        if self.bin_bytes % self.dtype.itemsize:
            raise ValueError(
                f"{self.bin_path} has {self.bin_bytes} bytes, expected a multiple of {self.dtype.itemsize} "
                f"({self.dtype.name} tokens); it is truncated or of another index: make it again"
            )
        empty = np.zeros(0, self.dtype)
        self.tokens = self._mapped(self.bin_path, self.dtype) if self.bin_bytes else empty

    def _mapped(self, path: str, dtype: np.dtype) -> np.ndarray:
        array = np.memmap(path, mode="r", dtype=dtype)
        self._maps.append(array._mmap)
        return np.asarray(array)

    def release(self) -> None:
        """Take the pages that were read out of this process's memory; what is read again comes from the disk's cache.

        For passes over corpora that are larger than the memory: a system does it late, and counts them till then.
        """
        for mapped in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def _check_arrays(self) -> None:
        itemsize = self.dtype.itemsize
        for part in self._passing(len(self)):
            lengths, pointers = (
                self.lengths[part].copy(),
                self.pointers[part].copy(),
            )  # aligned, so several times faster
            if lengths.min() < 0:
                unit = part.start + int(lengths.argmin())
                raise self._damaged(f"sequence {unit} has length {lengths.min()}, expected 0 or more")
            if pointers.min() < 0 or int(np.bitwise_or.reduce(pointers)) % itemsize:
                unit = part.start + int(np.argmax((pointers < 0) | (pointers % itemsize != 0)))
                raise self._damaged(
                    f"sequence {unit} starts at byte {self.pointers[unit]}, expected 0, {itemsize}, ..."
                )
            room = self.bin_bytes - pointers
            if room.min() >= 0:  # only then can the lengths be subtracted without overflow
                room -= lengths * np.int64(itemsize)
            if room.min() < 0:
                unit = part.start + int(room.argmin())
                raise ValueError(
                    f"{self.bin_path} has {self.bin_bytes} bytes, but sequence {unit} of its index needs "
                    f"{self.lengths[unit]} tokens from byte {self.pointers[unit]} on; "
                    "the file is truncated or of another index: make it again"
                )
        documents = self.document_indices
        if documents[0] != 0 or documents[-1] != len(self):
            raise self._damaged(f"documents from {documents[0]} to {documents[-1]}, expected 0 to {len(self)}")
        for part in self._passing(len(documents) - 1):
            bounds = documents[part.start : part.stop + 1].copy()
            if (bounds[1:] < bounds[:-1]).any():
                raise self._damaged("document indices that decrease")

    def _passing(self, count: int) -> Iterator[slice]:
        """Blocks of an array that is read once, of which little stays in memory."""
        for number, part in enumerate(blocks(count), 1):
            yield part
            if number % RELEASED_BLOCKS == 0:
                self.release()

    def _damaged(self, found: str) -> ValueError:
        return ValueError(
            f"{self.index_path} is not a usable index: {found}; it is damaged or incomplete: make it again"
        )

    def __reduce__(self):
        """Pickle as the path: another process maps the files again instead of receiving their content."""
        return IndexedCorpus, (self.prefix,)

    def __len__(self) -> int:
        """Number of units."""
        return len(self.lengths)

    def __getitem__(self, unit: int) -> np.ndarray:
        """Tokens of one unit, a read-only view of the mapped ``.bin``."""
        if not 0 <= unit < len(self):
            raise IndexError(f"unit {unit} of {self.prefix}, expected 0 to {len(self) - 1}")
        start = int(self.pointers[unit]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[unit])]

    @property
    def num_tokens(self) -> int:
        """Tokens over all units."""
        return sum(int(self.lengths[part].sum(dtype=np.int64)) for part in blocks(len(self)))

    def token_positions(self, ids: np.ndarray, max_length: int, *, keep: str = "head") -> tuple[np.ndarray, ...]:
        """Where the tokens of several units stand.

        Returns (rows, columns, positions) int64[tokens]: token ``positions[k]`` of ``.bin`` is token ``columns[k]`` of
        ``ids[rows[k]]``; and lengths int64[n]. Units longer than ``max_length`` keep their "head" or their "tail".
        """
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self)):
            raise IndexError(f"units {ids.min()} to {ids.max()} of {self.prefix}, expected 0 to {len(self) - 1}")
        full = self.lengths[ids].astype(np.int64)
        lengths = np.minimum(full, max_length)
        starts = self.pointers[ids].astype(np.int64) // self.dtype.itemsize
        if keep == "tail":
            starts += full - lengths
        rows = np.repeat(np.arange(len(ids)), lengths)
        columns = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return rows, columns, starts[rows] + columns, lengths

    def gather(self, ids: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of several units at once, cut to ``max_length``: (tokens int64[n, w], lengths int64[n]).

        w is the longest of the lengths; shorter rows are padded on the right with 0.
        """
        rows, columns, positions, lengths = self.token_positions(ids, max_length)
        tokens = np.zeros((len(lengths), int(lengths.max(initial=0))), dtype=np.int64)
        tokens[rows, columns] = self.tokens[positions]
        return tokens, lengths


def chosen(array: np.ndarray, ids: np.ndarray) -> Iterator[np.ndarray]:
    """``array[ids]`` in blocks, for increasing ids: reads the array once, front to back, with constant memory.

    The array may be an unaligned view of a mapped index, from which numpy would gather many times slower.
    """
    starts = np.arange(0, len(array), BLOCK)
    bounds = [*np.searchsorted(ids, starts).tolist(), len(ids)]
    for start, first, last in zip(starts.tolist(), bounds, bounds[1:], strict=False):
        if first < last:
            yield array[start : start + BLOCK].copy().take(ids[first:last] - start)


def in_blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array in blocks."""
    return (array[part] for part in blocks(len(array)))


def write_index(stream: IO[bytes], dtype: np.dtype, lengths: np.ndarray, pointers: np.ndarray | None = None) -> None:
    """Write an index whose every sequence is a document of its own.

    lengths int32[S] in tokens; pointers int64[S] in bytes (None: sequences follow each other in ``.bin``).
    """
    followed = contiguous_pointers(in_blocks(lengths), dtype.itemsize) if pointers is None else in_blocks(pointers)
    write_index_blocks(stream, dtype, len(lengths), in_blocks(lengths), followed)


def write_index_blocks(
    stream: IO[bytes],
    dtype: np.dtype,
    count: int,
    lengths: Iterable[np.ndarray],
    pointers: Iterable[np.ndarray],
    documents: tuple[int, Iterable[np.ndarray]] | None = None,
) -> None:
    """Write an index of ``count`` sequences from blocks of its arrays, one array after the other.

    documents: (D, blocks of the int64[D] document indices); None: every sequence is a document of its own.
    """
    code = next(code for code, known in TOKEN_DTYPES.items() if np.dtype(known) == dtype.newbyteorder("="))
    if documents is None:
        ends = (np.arange(part.start, part.stop, dtype="<i8") for part in blocks(count + 1))
        documents = (count + 1, ends)
    stream.write(HEADER.pack(MAGIC, VERSION, code, count, documents[0]))
    for expected, stored, parts in (
        (count, "<i4", lengths),
        (count, "<i8", pointers),
        (documents[0], "<i8", documents[1]),
    ):
        written = 0
        for part in parts:
            stream.write(np.ascontiguousarray(part, dtype=stored))
            written += len(part)
        assert written == expected, f"{written} entries of an index of {expected}"


def contiguous_pointers(lengths: Iterable[np.ndarray], itemsize: int) -> Iterator[np.ndarray]:
    """Pointers int64 in bytes, in blocks, of sequences that follow each other from byte 0 on."""
    position = 0
    for part in lengths:
        sizes = np.asarray(part, dtype=np.int64) * itemsize
        ends = position + np.cumsum(sizes)
        yield ends - sizes
        position = int(ends[-1]) if len(ends) else position
