"""Run a function on several gloo ranks of this machine, for tests.

Workers come from a fork server that has already imported torch, which saves seconds per rank. The function must be
importable (defined at a module's top level) and is called as ``function(rank, world_size, *arguments)``; what the ranks
return comes back as a list. An error on a rank is raised here with that rank's traceback.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path


def _worker(function, rank, world_size, store, queue, arguments):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
        )
        queue.put((rank, True, function(rank, world_size, *arguments)))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_distributed(function, world_size: int, *arguments, timeout: float = 300.0) -> list:
    """Call ``function(rank, world_size, *arguments)`` on ``world_size`` ranks with the default gloo group initialised.

    Return values must be picklable (plain numbers, numpy arrays, lists; convert tensors with ``.numpy()``).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "numpy"])
    queue = context.Queue()
    results: dict[int, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        workers = [
            context.Process(target=_worker, args=(function, rank, world_size, store, queue, arguments), daemon=True)
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        try:
            for _ in range(world_size):
                rank, ok, value = queue.get(timeout=timeout)
                if not ok:
                    raise RuntimeError(f"rank {rank} failed:\n{value}")
                results[rank] = value
        finally:
            for worker in workers:
                worker.join(timeout=10 if len(results) == world_size else 0.5)
                if worker.is_alive():
                    worker.kill()
    return [results[rank] for rank in range(world_size)]
