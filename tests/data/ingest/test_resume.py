"""A run that was killed goes on and gives the same bytes; nothing half done is ever seen under a final name."""

import fcntl
import os

import pytest

from megatron_bliss.data.ingest import assembly, preprocess
from megatron_bliss.data.ingest.workers import Workers
from tests.data.corpora import documents
from tests.data.ingest.killed_runs import check_killed_runs
from tests.data.ingest.mortal import Mortal
from tests.data.ingest.source_files import make, same_files, write_source

ALL = (".bin", ".idx", ".rejected.jsonl", ".provenance.parquet")


@pytest.mark.parametrize("seed", [1])
def test_runs_killed_at_random_instants_end_with_the_same_bytes(tmp_path, seed):
    found = check_killed_runs(tmp_path, kills=4, seed=seed, documents_per_file=30)
    assert len(found) == 4


class Killed(BaseException):
    """Stands for the end of the process: nothing may clean up on the way out but what a kill would leave, too."""


@pytest.mark.parametrize("unit", ["document", "window"])
def test_a_run_stopped_after_any_published_file_ends_with_the_same_bytes(tmp_path, monkeypatch, unit):
    files = [write_source(tmp_path / f"{name}.jsonl.gz", documents(20, seed)) for seed, name in enumerate("ab")]
    options = {"unit": unit, "window_length": 16, "piece_megabytes": 0.001}
    manifest, whole = make(tmp_path, files, "whole", **options)
    publish, write_manifest = assembly.publish, preprocess.write_manifest
    for stop in range(6):
        seen = []

        def publish_or_die(temporary, path, seen=seen, stop=stop):
            if len(seen) == stop:
                raise Killed
            publish(temporary, path)
            seen.append(path)

        def manifest_or_die(*arguments, stop=stop):
            if stop == 4:
                raise Killed
            write_manifest(*arguments)
            raise Killed

        monkeypatch.setattr(assembly, "publish", publish_or_die)
        monkeypatch.setattr(preprocess, "write_manifest", manifest_or_die)
        with pytest.raises(Killed):
            make(tmp_path, files, f"X{stop}", **options)
        monkeypatch.undo()
        assert len(seen) == min(stop, 4) and os.path.exists(tmp_path / f"X{stop}.pieces")
        assert make(tmp_path, files, f"X{stop}", **options)[0] == manifest
        assert same_files(whole.prefix, tmp_path / f"X{stop}", ALL)
        assert not os.path.exists(tmp_path / f"X{stop}.pieces")


def test_finished_pieces_are_not_made_again(tmp_path, monkeypatch):
    source = write_source(tmp_path / "a.jsonl.gz", documents(60))
    _, whole = make(tmp_path, [source], "whole")
    made, fill = [], preprocess.PieceMaker._fill

    def counted(self, writer, task):
        if len(made) == 5:
            raise Killed
        made.append(task.piece)
        return fill(self, writer, task)

    monkeypatch.setattr(preprocess.PieceMaker, "_fill", counted)
    with pytest.raises(Killed):
        make(tmp_path, [source], piece_megabytes=0.001)
    assert made == [0, 1, 2, 3, 4]
    made.clear()
    made += [-1] * 4  # one more, then killed again
    with pytest.raises(Killed):
        make(tmp_path, [source], piece_megabytes=0.001)
    assert made[4:] == [5]
    monkeypatch.setattr(preprocess.PieceMaker, "_fill", fill)
    _, corpus = make(tmp_path, [source], piece_megabytes=0.001)
    assert same_files(whole.prefix, corpus.prefix, ALL)


def test_a_second_run_on_the_same_folder_is_refused(tmp_path):
    source = write_source(tmp_path / "a.jsonl", documents(3))
    os.makedirs(tmp_path / "X.pieces")
    with open(tmp_path / "X.pieces" / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="X.pieces is in use by another process"):
            make(tmp_path, [source])
    assert len(make(tmp_path, [source])[1]) == 3


def test_a_worker_that_dies_is_an_error_that_says_what_to_do():
    tasks = iter([1, 3])
    with pytest.raises(RuntimeError, match="worker process died .* run the same command again"):  # noqa: SIM117
        with Workers(2, Mortal, ()) as workers:
            list(workers.run(lambda worker: next(tasks, None)))


def test_an_error_in_a_worker_comes_with_its_traceback():
    tasks = iter([1, "x"])
    with pytest.raises(RuntimeError, match="in a worker process: (.|\n)*TypeError"):  # noqa: SIM117
        with Workers(2, Mortal, ()) as workers:
            list(workers.run(lambda worker: next(tasks, None)))
