"""What every benchmark needs: the machine in words, interleaved times, and true peaks of memory.

Peak on a CPU: a process of its own per case. It runs the case once (optimiser state, kernels and thread pools come into
being), gives freed pages back (``malloc_trim``), notes its resident set, resets the kernel's high-water mark
(/proc/self/clear_refs), runs the case again and reads the mark (VmHWM). Peak = mark - resident set: what the case needs
above what it holds between two steps, which is parameters, optimiser state and z. The process runs under
``ALLOCATOR``: every block of 64 KiB or more comes from the system and goes back when freed, so that the resident set is
what is alive and not what the allocator hoards (glibc by itself keeps freed blocks of up to 32 MiB).

Peak on CUDA: the same, by ``torch.cuda.max_memory_allocated`` and ``memory_allocated``.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
"""Environment of a process whose resident set is to be measured (glibc)."""


class Peak(NamedTuple):
    """Bytes: the high-water mark above ``held``, and what was held before the case ran."""

    peak: int
    held: int


def machine(device: torch.device) -> dict[str, str | int | float]:
    """The machine, the software and the date, to stand beside the numbers; load shows whether it was idle."""
    found: dict[str, str | int | float] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": _line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }
    memory = _line("/proc/meminfo", "MemTotal")
    return found | ({"memory_gib": round(int(memory.split()[0]) / 2**20, 1)} if memory else {})


def interleaved_times(
    cases: Mapping[str, Callable[[], object]], repetitions: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every case, ``repetitions`` times each, taken in turns so that a drift of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repetitions):
        for name, case in cases.items():
            gc.collect()
            synchronize(device)
            start = time.perf_counter()
            case()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return times


def measure_peak(case: Callable[[], object], device: torch.device) -> Peak:
    """The peak of ``case`` in this process, which should run under ``ALLOCATOR`` and do nothing else."""
    case()
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        case()
        return Peak(torch.cuda.max_memory_allocated(device) - held, held)
    _trim()
    held = _resident("VmRSS")
    _reset_high_water_mark()
    case()
    return Peak(max(_resident("VmHWM") - held, 0), held)


def held_now(device: torch.device) -> int:
    """Bytes that this process holds: allocated on a GPU, else resident."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    _trim()
    return _resident("VmRSS")


def return_freed_memory() -> None:
    """What ``ALLOCATOR`` asks of glibc, for a process that has since asked it for the opposite."""
    libc = ctypes.CDLL(None)
    for option, value in ((-1, 1 << 16), (-3, 1 << 16), (-4, 1 << 16)):  # trim and mmap threshold, number of mmaps
        libc.mallopt(option, value)


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _trim() -> None:
    """Give free heap pages back to the system; other C libraries than glibc have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_high_water_mark() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise ValueError(
            f"found no writable /proc/self/clear_refs on {sys.platform} ({error}), expected Linux: run with --no-memory"
        ) from error


def _resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    return int(_line("/proc/self/status", field).split()[0]) * 1024


def _line(path: str, field: str) -> str:
    """The value of the first ``field: value`` line of a file under /proc; empty where there is none."""
    if not os.path.exists(path):
        return ""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""
