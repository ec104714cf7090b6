"""How far a run has come: MB/s, documents/s, tokens/s and the time left, for a person or as JSON lines."""

from __future__ import annotations

import json
import sys
import time
from typing import IO, Literal

from megatron_bliss.data.ingest.piece_files import PieceSummary

SECONDS_BETWEEN = {"terminal": 0.5, "lines": 5.0, "json": 2.0}


class IngestProgress:
    """Counts pieces. ``total_bytes`` and what is done of it are bytes of the sources as they are on disk.

    Rates are of this run alone, MB are of text as it is after decompression; what an earlier run did counts as done.
    """

    def __init__(self, mode: Literal["auto", "none", "json"], total_bytes: int, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._style = ("terminal" if self._stream.isatty() else "lines") if mode == "auto" else mode
        self._total, self._read = max(total_bytes, 1), {}
        self._earlier = 0
        self.counts = {"text_bytes": 0, "documents": 0, "tokens": 0, "rejected": 0}
        self._start = self._shown = time.monotonic()

    def add(self, summary: PieceSummary, source_bytes: int, *, earlier: bool = False) -> None:
        """Count a piece of a source of ``source_bytes``."""
        reached = source_bytes if summary.last else min(summary.file_bytes, source_bytes)
        self._read[summary.source] = max(self._read.get(summary.source, 0), reached)
        if earlier:
            self._earlier = sum(self._read.values())
            return
        for name in self.counts:
            self.counts[name] += getattr(summary, name)
        if self._style != "none" and time.monotonic() - self._shown >= SECONDS_BETWEEN[self._style]:
            self._show()

    def state(self) -> dict:
        """Everything that is shown, as numbers."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        read = sum(self._read.values())
        rate = (read - self._earlier) / seconds
        rates = {f"{name}_per_second": self.counts[name] / seconds for name in ("documents", "tokens")}
        return {
            "fraction": min(read / self._total, 1.0),
            "seconds": round(seconds, 3),
            **self.counts,
            "megabytes_per_second": round(self.counts["text_bytes"] / seconds / 1e6, 3),
            **{name: round(value, 1) for name, value in rates.items()},
            "eta_seconds": round((self._total - read) / rate, 1) if rate > 0 else None,
        }

    def finish(self) -> None:
        """Show the last state."""
        if self._style != "none":
            self._show()
            if self._style == "terminal":
                self._stream.write("\n")

    def _show(self) -> None:
        self._shown, state = time.monotonic(), self.state()
        if self._style == "json":
            self._stream.write(json.dumps(state) + "\n")
        else:
            self._stream.write(f"\r{_line(state)}\x1b[K" if self._style == "terminal" else f"{_line(state)}\n")
        self._stream.flush()


def _line(state: dict) -> str:
    left = state["eta_seconds"]
    eta = "" if left is None else f", {int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d} left"
    return (
        f"tokenise {state['fraction']:4.0%}, {state['megabytes_per_second']:.1f} MB/s, "
        f"{state['documents_per_second']:,.0f} documents/s, {state['tokens_per_second']:,.0f} tokens/s, "
        f"{state['rejected']:,} rejected{eta}"
    )
