"""Kill ``preprocess_data.py`` at random instants and look at what it leaves and what becomes of it.

By hand, with more of it than in the test: ``python -m tests.data.killed_runs FOLDER 20``.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_bliss.data.manifest import corpus_digest
from tests.data.corpora import documents
from tests.data.ingest.source_files import write_source
from tools import preprocess_data

OUTPUTS = (".bin", ".idx", ".manifest.json", ".provenance.parquet", ".rejected.jsonl")


def write_sources(folder: Path, count: int) -> list[str]:
    """A file of every kind, ``count`` documents each, one of them with a bad line."""
    kinds = ("jsonl.gz", "json.zst", "parquet", "jsonl")
    files = [write_source(folder / f"{seed}.{kind}", documents(count, seed)) for seed, kind in enumerate(kinds)]
    with open(files[-1], "ab") as stream:
        stream.write(b'{"text": 1}\n')
    return files


def command(files: Sequence[str], prefix: Path, *options: str) -> list[str]:
    """The command that is killed and given again."""
    fixed = ["--output-prefix", str(prefix), "--tokenizer-type", "bytes", "--progress", "none"]
    pieces = ["--workers", "2", "--piece-megabytes", "0.002"]
    return [sys.executable, preprocess_data.__file__, "--input", *files, *fixed, *pieces, *options]


def start(arguments: Sequence[str]) -> subprocess.Popen:
    """Start the command in a process group of its own."""
    root = str(Path(preprocess_data.__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        list(arguments), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def contents(prefix: Path) -> dict[str, bytes]:
    """What is there under the final names."""
    return {end: Path(f"{prefix}{end}").read_bytes() for end in OUTPUTS if os.path.exists(f"{prefix}{end}")}


def wait_for(path: Path, process: subprocess.Popen) -> bool:
    """Wait for a file to appear; False when the process ended first."""
    while not path.exists():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def complete(arguments: Sequence[str], prefix: Path) -> tuple[dict[str, bytes], float]:
    """Run to the end; returns the outputs, and the seconds from the first file on."""
    process = start(arguments)
    wait_for(Path(f"{prefix}.pieces") / "plan.json", process)
    begin = time.monotonic()
    error = process.communicate()[1]
    assert process.returncode == 0, error.decode()
    return contents(prefix), time.monotonic() - begin


def kill_at_random(arguments: Sequence[str], prefix: Path, seconds: float, generator: random.Random) -> str:
    """Start the command and kill it with its workers at some instant of its work; says how far it had come."""
    process = start(arguments)
    work = Path(f"{prefix}.pieces")
    if wait_for(work / "plan.json", process):
        time.sleep(generator.uniform(0, seconds))
        os.kill(process.pid, signal.SIGKILL)  # the workers have to notice
    process.communicate()
    if process.returncode == 0:
        return "finished"  # before the kill
    assert process.returncode == -signal.SIGKILL, process.returncode
    pieces = len(list(work.glob("*.piece"))) if work.exists() else 0
    return f"{pieces} pieces, {len(contents(prefix))} outputs"


def check_killed_runs(folder: Path, kills: int, seed: int, documents_per_file: int = 60) -> list[str]:
    """Kill a run ``kills`` times, each from the beginning; every one is then finished by the same command.

    Asserts that what stands under a final name is always whole, and that the outputs are those of a run that nobody
    killed. Returns how far each had come.
    """
    generator, found = random.Random(seed), []
    files = write_sources(folder, documents_per_file)
    expected, seconds = complete(command(files, folder / "whole"), folder / "whole")
    assert set(expected) == set(OUTPUTS)
    while len(found) < kills:
        prefix = folder / f"killed{len(found)}" / "whole"
        prefix.parent.mkdir()
        state = kill_at_random(command(files, prefix), prefix, seconds, generator)
        if state == "finished":  # this run was faster than the first
            seconds *= 0.8
        else:
            found.append(state)
        for end, data in contents(prefix).items():
            assert data == expected[end], f"{end} of a killed run: {len(data)} of {len(expected[end])} bytes"
        outputs, _ = complete(command(files, prefix), prefix)
        assert outputs == expected, [end for end in OUTPUTS if outputs[end] != expected[end]]
        corpus_digest(prefix)
        assert sorted(os.listdir(prefix.parent)) == sorted(f"whole{end}" for end in OUTPUTS)
        shutil.rmtree(prefix.parent)
    return found


if __name__ == "__main__":
    for line in check_killed_runs(Path(sys.argv[1]), int(sys.argv[2]), seed=int(sys.argv[3]) if sys.argv[3:] else 0):
        print(line)
