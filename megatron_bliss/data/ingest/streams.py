"""The text of a source file as one stream of bytes: plain, gzip or zstandard, hashed as it is read."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import zlib

import pyarrow as pa

try:
    from isal import igzip_lib
except ImportError:  # no wheel for every platform; Python's own reader gives the same bytes, three times slower
    igzip_lib = None

READ_BYTES = 1 << 20
COMPRESSION = {".gz": "gzip", ".zst": "zstandard"}
GZIP_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, *((igzip_lib.IsalError,) if igzip_lib else ()))


class DamagedSource(ValueError):
    """A file whose content cannot be read any further; its text says why."""


class HashingReader(io.RawIOBase):
    """A file that counts and hashes what is read from it."""

    def __init__(self, path: str) -> None:
        self._file, self._digest, self.count = open(path, "rb", buffering=0), hashlib.sha256(), 0  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._file.readinto(buffer)
        if self._digest is not None:
            self._digest.update(memoryview(buffer)[:count])
        self.count += count
        return count

    def jump(self, position: int) -> None:
        """Go on reading at ``position``; there is no digest of the whole file then."""
        self._file.seek(position)
        self.count, self._digest = position, None

    def finish(self) -> str | None:
        """Read to the end; returns the SHA-256 of the file, None after a jump."""
        if self._digest is None:
            return None
        while self.read(READ_BYTES):
            pass
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()
        super().close()


class ByteStream:
    """Decompressed bytes of one file; the suffix tells how it is compressed. Memory: a few READ_BYTES."""

    def __init__(self, path: str) -> None:
        self.compression = COMPRESSION.get(os.path.splitext(path)[1])
        self._raw = HashingReader(path)
        self._stream = _OPEN[self.compression](self._raw)

    def read(self) -> bytes:
        """The next bytes, none at the end. Raises DamagedSource."""
        try:
            data = self._stream.read1(READ_BYTES) if self.compression == "gzip" else self._stream.read(READ_BYTES)
        except GZIP_DAMAGE as error:
            raise DamagedSource(f"damaged gzip file, the rest cannot be read: {error}") from error
        except OSError as error:
            if self.compression != "zstandard" or error.errno is not None:
                raise  # the disk's fault, not the content's
            raise DamagedSource(f"damaged zstandard file, the rest cannot be read: {error}") from error
        if not data and self.compression and not self._raw.count:
            raise DamagedSource(f"damaged {self.compression} file: it is empty")
        return data

    def jump(self, position: int) -> None:
        """Go on reading at ``position``, in a file that is not compressed."""
        assert self.compression is None
        self._raw.jump(position)

    @property
    def file_bytes(self) -> int:
        """Bytes of the file, as it is on disk, that were read."""
        return self._raw.count

    def finish(self) -> str | None:
        """Read the file to its end; returns its SHA-256, None where not all of it passed through here."""
        return self._raw.finish()

    def close(self) -> None:
        """Close the file."""
        self._raw.close()


class _GzipMembers:
    """Gzip members one after another through isal, whose own file reader keeps back what precedes a truncation."""

    def __init__(self, raw: HashingReader) -> None:
        self._raw, self._input, self._decompressor, self._first = raw, b"", None, True

    def read1(self, size: int) -> bytes:
        """Some bytes, none at the end. Raises what is in GZIP_DAMAGE."""
        while True:
            if self._decompressor is None and not self._begin_member():
                return b""
            if self._decompressor.needs_input and not self._input:
                self._input = self._raw.read(READ_BYTES)
                if not self._input:
                    raise EOFError("it ends before its end-of-stream marker")
            data = self._decompressor.decompress(self._input, size)
            self._input = b""  # the decompressor keeps what it has not used yet
            if self._decompressor.eof:
                self._input, self._decompressor = self._decompressor.unused_data.lstrip(b"\0"), None
            if data:
                return data

    def _begin_member(self) -> bool:
        while not self._input:
            read = self._raw.read(READ_BYTES)
            if not read:
                return False
            self._input = read if self._first else read.lstrip(b"\0")  # zeros may follow the last member
        self._decompressor = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        self._first = False
        return True


def _open_gzip(raw: HashingReader):
    return _GzipMembers(raw) if igzip_lib else gzip.GzipFile(fileobj=io.BufferedReader(raw, READ_BYTES))


def _open_zstandard(raw: HashingReader) -> pa.CompressedInputStream:
    """Arrow's reader: its output is bounded, it reads frame after frame, and a truncated frame is an error."""
    return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")


_OPEN = {None: lambda raw: raw, "gzip": _open_gzip, "zstandard": _open_zstandard}
