"""What it costs to deal a corpus to shards, to order it, to choose a subset and to verify, per million synthetic units.

The units are ``TOKENS`` tokens long and lie in a ``.bin`` of zeros that takes no room on disk; the scores are random.
Every case runs in two processes of its own, once to warm up and once to be measured: in one for the time, and in one
under ``measure.ALLOCATOR`` for the memory. Bytes per unit are the process's high-water mark above what it held before,
mapped pages of files among them. ``cpu_seconds`` are those of the process, without waiting for the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_bliss.base import parallel
from megatron_bliss.base.files import atomic_file
from megatron_bliss.config.models import TargetConfig
from megatron_bliss.config.platform import PlatformConfig
from megatron_bliss.config.selection import SelectionConfig
from megatron_bliss.data.batches import SampleOrder
from megatron_bliss.data.deal import deal_shards
from megatron_bliss.data.indexed import IndexedCorpus, blocks, contiguous_pointers, write_index_blocks
from megatron_bliss.data.manifest import adopt_manifest, manifest_path
from megatron_bliss.data.subset import write_subset
from megatron_bliss.data.verify import verify_corpus
from megatron_bliss.selection.select import apply_policy
from megatron_bliss.target.sequences import SequenceSource, TrainingSequences
from tools.benchmarks import measure

TOKENS = 8
"""Tokens of a synthetic unit: few, so that an index is measured and not the reading of ``.bin``."""
FRACTION = 0.2
SHARDS = 5
"""One for the warm-up, and one for each of four rounds."""


def subset_seconds_per_million(units: int, folder: str | os.PathLike) -> dict:
    """Threshold, index, unit numbers, manifest and fsync of the best fifth of ``units`` units.

    Returns {"units", "seconds", "cpu_seconds", "seconds_per_million", "cpu_seconds_per_million", "peak_bytes",
    "peak_bytes_per_unit"}.
    """
    return _in_a_process("subset", units, folder)


def verify_seconds_per_million(units: int, folder: str | os.PathLike) -> dict:
    """Structure, bounds, digests, ids and manifest of a corpus of ``units`` units; the same keys."""
    return _in_a_process("verify", units, folder)


def deal_seconds_per_million(units: int, folder: str | os.PathLike) -> dict:
    """A run's first stage, on its main rank: units dealt to ``SHARDS`` shards, an index of each; the same keys."""
    return _in_a_process("deal", units, folder)


def order_seconds_per_million(units: int, folder: str | os.PathLike) -> dict:
    """The shuffled order in which every rank draws samples of a shard, for its first batch; the same keys."""
    return _in_a_process("order", units, folder)


def sequences_seconds_per_million(units: int, folder: str | os.PathLike) -> dict:
    """megatron-core's order of a shard that the target trains on, on the main rank: a sequence for each unit, of which
    a fifth is trained on; the same keys."""
    return _in_a_process("sequences", units, folder)


def synthetic_corpus(units: int, folder: str | os.PathLike) -> str:
    """Prefix of a corpus of ``units`` units and its ``scores.npy`` in ``folder``, made unless they are there."""
    prefix = str(Path(folder) / f"synthetic-{units}")
    if os.path.exists(manifest_path(prefix)):
        return prefix
    Path(folder).mkdir(parents=True, exist_ok=True)
    with atomic_file(f"{prefix}.bin") as stream:
        stream.truncate(2 * TOKENS * units)
    lengths = [np.full(part.stop - part.start, TOKENS, dtype=np.int32) for part in blocks(units)]
    with atomic_file(f"{prefix}.idx") as stream:
        write_index_blocks(stream, np.dtype(np.uint16), units, lengths, contiguous_pointers(lengths, 2))
    with atomic_file(f"{prefix}.scores.npy") as stream:
        np.save(stream, np.random.default_rng(0).random(units, dtype=np.float32))
    adopt_manifest(prefix, None)
    return prefix


def _select_and_write(prefix: str, folder: Path) -> None:
    scores = np.load(f"{prefix}.scores.npy", allow_pickle=False)
    selection = SelectionConfig(settings={"fraction": FRACTION})
    ids, policy, label = apply_policy(prefix, scores, selection, seed=0)
    write_subset(prefix, ids, folder, label=label, policy=policy)


def _deal(prefix: str, folder: Path) -> None:
    for number, ids in enumerate(deal_shards(len(IndexedCorpus(prefix)), SHARDS, seed=0)):
        write_subset(prefix, ids, folder, label=f"shard{number}", policy={"number": number})


def _order(prefix: str, folder: Path) -> None:
    SampleOrder(len(IndexedCorpus(prefix)), seed=0).ids(0, 1)


def _order_for_the_target(prefix: str, folder: Path) -> None:
    groups = parallel.initialize(PlatformConfig(device="cpu"), TargetConfig(), seed=0)
    try:
        source = SequenceSource(prefix, 2, TOKENS, int(FRACTION * len(IndexedCorpus(prefix))), 0)
        TrainingSequences(source, groups, cache_folder=folder)
    finally:
        parallel.destroy()


CASES: dict[str, Callable[[str, Path], object]] = {
    "deal": _deal,
    "order": _order,
    "sequences": _order_for_the_target,
    "subset": _select_and_write,
    "verify": lambda prefix, folder: verify_corpus(prefix),
}


def _in_a_process(case: str, units: int, folder: str | os.PathLike) -> dict:
    synthetic_corpus(units, folder)
    times, peak = _child(case, units, folder, {}), _child(case, units, folder, measure.ALLOCATOR)
    per_million = {f"{name}_per_million": times[name] * 1e6 / units for name in ("seconds", "cpu_seconds")}
    sizes = {"peak_bytes": peak["peak_bytes"], "peak_bytes_per_unit": peak["peak_bytes"] / units}
    return {"units": units, "seconds": times["seconds"], "cpu_seconds": times["cpu_seconds"], **per_million, **sizes}


def _child(case: str, units: int, folder: str | os.PathLike, environment: dict[str, str]) -> dict:
    command = [sys.executable, "-m", "tools.benchmarks.index", case, str(units), str(Path(folder).resolve())]
    environment = os.environ | environment | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"found a failure of the case {case}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout)


def _measure(case: str, units: int, folder: str) -> dict:
    """Run in the child: seconds of the second run, and its peak."""
    prefix, seconds, processor = synthetic_corpus(units, folder), [], []

    def run() -> None:
        output = Path(folder) / f"{case}-{os.getpid()}-{len(seconds)}"
        start, start_cpu = time.perf_counter(), time.process_time()
        CASES[case](prefix, output)
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_cpu)
        shutil.rmtree(output, ignore_errors=True)

    peak = measure.measure_peak(run, torch.device("cpu")).peak
    return {"seconds": seconds[-1], "cpu_seconds": processor[-1], "peak_bytes": peak}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
