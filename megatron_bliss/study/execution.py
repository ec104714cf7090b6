"""The runs of a study, one after another, each in processes of its own; what is finished is not run again."""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO

from megatron_bliss.base.files import atomic_file
from megatron_bliss.base.text import format_seconds
from megatron_bliss.config.parse import dump_yaml
from megatron_bliss.study.budget import Clock, keep_times
from megatron_bliss.study.runs import StudyRun
from megatron_bliss.study.warmup import share_warmup
from megatron_bliss.study.work import finished_work

LAST_LINES = 20
"""Of a failed run's log, as many are shown."""
Launch = Callable[[Path], list[str]]
"""The command that makes the run of a file of options."""


def run_all(runs: Sequence[StudyRun], launch: Launch, clock: Clock) -> None:
    """Run what is not finished. ValueError where a run fails, OutOfTime where the next one would not end in time."""
    with _only_ones({run.folder.parent for run in runs}) as locks:
        for number, run in enumerate(runs, start=1):
            place = f"[{number}/{len(runs)}] {run.name}"
            if run.is_finished():
                print(f"{place}: finished before", flush=True)
                continue
            clock.check(run)
            source = share_warmup(run, [one for one in runs[: number - 1] if one.seed == run.seed])
            shared = f", warm-up of {source.variant}" if source else ""
            print(f"{place}: arms {', '.join(run.config.arms)}{shared}; log: {run.beside('.log')}", flush=True)
            before, start = finished_work(run), time.monotonic()
            _run(run, launch(run.beside(".yaml")), locks[run.folder.parent])
            seconds = time.monotonic() - start
            keep_times(run, seconds, before)
            print(f"{place}: done in {format_seconds(seconds)}, {clock.left()}", flush=True)


def launcher(entry: Path, processes: int) -> Launch:
    """Start ``entry``, the script that makes a run, in so many processes."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return lambda options: [
        sys.executable, *(several if processes > 1 else []), str(entry), "--config", str(options)
    ]  # fmt: skip


def _run(run: StudyRun, command: list[str], lock: IO) -> None:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(run.beside(".yaml"), "w") as file:
        file.write(dump_yaml(run.config))
    log = run.beside(".log")
    with open(log, "a", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()])
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        raise ValueError(
            "\n".join(lines) + f"\nfound status {status} of {run.name}, expected a finished run: mend what its log "
            f"{log} says; the same command goes on from there"
        )


@contextlib.contextmanager
def _only_ones(folders: Collection[Path]) -> Iterator[dict[Path, IO]]:
    """Hold the folder of each seed, so that seeds can be run side by side, on machines of their own.

    A seed's runs hold it, too: one that outlives a killed study gets no second beside it.
    """
    with contextlib.ExitStack() as stack:
        locks = {}
        for folder in sorted(folders):
            folder.mkdir(parents=True, exist_ok=True)
            locks[folder] = lock = stack.enter_context(open(folder / "lock", "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"found {folder} at work, in another study or a run that one has left, expected it free: wait for "
                    "its end, or end it"
                ) from None
        yield locks
