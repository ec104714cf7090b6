"""Files that no reader ever sees half written, and their digests.

Everything goes to a temporary name in the same folder, is flushed to disk, and then renamed over the final name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for every platform; Python's own gives the same value, ten times slower
    from zlib import crc32

HASH_BLOCK = 1 << 22


def sync_folder(folder: str | os.PathLike) -> None:
    """Flush a folder's entries, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: str | os.PathLike, path: str | os.PathLike) -> None:
    """Rename a finished, flushed temporary file to its final name."""
    os.replace(temporary, path)
    sync_folder(Path(path).parent)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file that becomes ``path`` when the block ends without an error, and vanishes otherwise."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        publish(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write a JSON file atomically, indented, keys in the order given."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_file(path, "w") as stream:
        stream.write(text + "\n")


def read_json(path: str | os.PathLike) -> dict:
    """Read a JSON object; a damaged file is a ValueError that names it."""
    try:
        value = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); remove it and make it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object; remove it and make it again")
    return value


def sha256_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def crc32_file(path: str | os.PathLike) -> int:
    """CRC-32 of a file's content: some thirty times faster than SHA-256, and enough to notice an accident."""
    value, buffer = 0, memoryview(bytearray(HASH_BLOCK // 8))  # stays in the processor's cache
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            value = crc32(buffer[:count], value)
    return value


class DigestWriter:
    """Hashes what goes through it to a stream, so that a large file need not be read again for its digests."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._sha256, self.crc32 = stream, hashlib.sha256(), 0

    def write(self, data) -> int:
        """Write bytes or a contiguous array."""
        view = memoryview(data).cast("B") if memoryview(data).nbytes else b""
        self._sha256.update(view)
        self.crc32 = crc32(view, self.crc32)
        return self._stream.write(view)

    @property
    def sha256(self) -> str:
        """SHA-256 of all that was written, in hexadecimal."""
        return self._sha256.hexdigest()


def sha256_text(*parts: str) -> str:
    """SHA-256 of several strings, each ended by a zero byte, in hexadecimal."""
    return hashlib.sha256(b"".join(part.encode() + b"\0" for part in parts)).hexdigest()
