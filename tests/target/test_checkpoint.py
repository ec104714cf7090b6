"""Checkpoints of the target come back as they were or not at all."""

from __future__ import annotations

import io
import os
import pickle
import signal
from enum import Enum
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_bliss.base import checkpoint
from megatron_bliss.base.files import read_json, write_json
from megatron_bliss.base.parallel import barrier
from megatron_bliss.config.output import CheckpointConfig
from megatron_bliss.target import checkpoint as target_checkpoint
from megatron_bliss.target import torch_dist
from megatron_bliss.target.checkpoint import load_target_weights_from, save_target, start_save
from megatron_bliss.target.model import Target
from tests.distributed import run_distributed
from tests.targets import grouped, layout, make_corpus, make_target, segment_of, setup_of, train


@pytest.fixture
def groups():
    with grouped(layout()) as groups:
        yield groups


def target_of(groups, seed: int = 3) -> Target:
    return make_target(layout(), groups, seed=seed)


def weights_of(target: Target) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in target[0].named_parameters()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def save(folder, step: int, groups, **options) -> Path:
    """Checkpoint ``step`` with weights drawn from seed ``step``."""
    return save_target(folder, step, target_of(groups, step), groups, shared={"step": step}, **options)


def test_the_newest_finished_checkpoint_is_found_and_old_ones_go(tmp_path, groups):
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "nowhere") is None
    for step in (5, 10, 100):
        assert save(tmp_path, step, groups) == checkpoint.latest(tmp_path) == tmp_path / f"step_{step:08d}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_00000100"]
    (tmp_path / "step_00000200").mkdir()  # no manifest: not finished
    (tmp_path / ".step_00000300.tmp").mkdir()
    assert checkpoint.latest(tmp_path).name == "step_00000100"
    save(tmp_path, 400, groups, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000010",
        "step_00000100",
        "step_00000200",
        "step_00000400",
    ]
    checkpoint.keep_last(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000200", "step_00000400"]


def test_weights_come_back_and_can_be_written_again(tmp_path, groups):
    save(tmp_path, 5, groups)
    path = save_target(tmp_path, 5, target_of(groups, 6), groups, shared={"note": "again"})
    target = target_of(groups, 1)
    assert load_target_weights_from(path, target, groups) == {"note": "again"}
    assert same(weights_of(target), weights_of(target_of(groups, 6)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000005"]


def test_a_failed_save_keeps_the_checkpoints_there_are(tmp_path, groups, monkeypatch):
    save(tmp_path, 5, groups)
    with pytest.raises(RuntimeError, match="rank 0 failed with"):
        save_target(tmp_path, 10, target_of(groups), groups, shared={"function": lambda: None})

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for asynchronous in (False, True):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="No space left"):
            patch.setattr(torch_dist.Writer, "write", no_space)
            start_save(tmp_path, 10, target_of(groups), groups, shared={}, asynchronous=asynchronous).finish()
    assert checkpoint.latest(tmp_path).name == "step_00000005"
    save(tmp_path, 10, groups)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000005", "step_00000010"]


def test_an_asynchronous_save_keeps_the_weights_of_its_moment(tmp_path, groups, monkeypatch):
    target = target_of(groups)
    before, wait, write = weights_of(target), torch.multiprocessing.Event(), torch_dist.Writer.write

    def write_later(writer) -> list[str]:
        assert wait.wait(60)
        return write(writer)

    monkeypatch.setattr(torch_dist.Writer, "write", write_later)
    pending = start_save(tmp_path, 5, target, groups, shared={}, asynchronous=True)
    with torch.no_grad():
        for parameter in target[0].parameters():
            parameter.add_(1.0)
    assert not pending.is_written() and checkpoint.latest(tmp_path) is None
    wait.set()
    path = pending.finish()
    assert checkpoint.latest(tmp_path) == path
    load_target_weights_from(path, target, groups)
    assert same(weights_of(target), before)


def test_damage_in_a_checkpoint_names_the_file(tmp_path, groups):
    path, target = save(tmp_path, 5, groups), target_of(groups)
    loading = partial(load_target_weights_from, path, target, groups)
    for name in ("__0_0.distcp", ".metadata", "common.pt", "metadata.json"):
        file = path / name
        content = file.read_bytes()
        middle = len(content) // 2
        damages = {
            f"found {middle} bytes in .*{name}, expected {len(content)}": content[:middle],
            f"found a wrong checksum in .*{name}": content[:middle]
            + bytes([content[middle] ^ 1])
            + content[middle + 1 :],
        }
        for message, damaged in damages.items():
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{message}.*remove the folder {path}"):
                loading()
        file.unlink()
        with pytest.raises(ValueError, match=f"found no file .*{name}.*remove the folder {path}"):
            loading()
        file.write_bytes(content)
    loading()
    manifest = read_json(path / "manifest.json")
    write_json(path / "manifest.json", {**manifest, "format": 1})
    with pytest.raises(ValueError, match="found checkpoint format 1 .*, expected 2"):
        loading()
    (path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=f"damaged .*manifest.json .*remove the folder {path}"):
        loading()
    (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="expected a finished checkpoint"):
        loading()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_pickle_that_calls_something_is_not_obeyed(tmp_path, groups, monkeypatch):
    """A checkpoint from elsewhere, whose manifest agrees with it."""
    monkeypatch.chdir(tmp_path)
    path, target = save(tmp_path, 5, groups), target_of(groups)
    manifest = read_json(path / "manifest.json")

    def with_content(name: str, content: bytes) -> None:
        (path / name).write_bytes(content)
        files = {**manifest["files"], name: checkpoint.describe_file(path / name)}
        write_json(path / "manifest.json", {**manifest, "files": files})

    contents = {name: (path / name).read_bytes() for name in (".metadata", "common.pt")}
    with_content(".metadata", pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="mkdir has no place there in .*do not use this checkpoint"):
        load_target_weights_from(path, target, groups)
    with_content(".metadata", pickle.dumps({"other": 1}))
    with pytest.raises(ValueError, match="do not use this checkpoint"):
        load_target_weights_from(path, target, groups)
    with_content(".metadata", contents[".metadata"].replace(b"__0_0.distcp", b"../../../../"))
    with pytest.raises(ValueError, match="found other than tensors of this checkpoint"):
        load_target_weights_from(path, target, groups)
    with_content(".metadata", contents[".metadata"])
    torch.save({"shared": Evil()}, path / "common.pt")
    with_content("common.pt", (path / "common.pt").read_bytes())
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_target_weights_from(path, target, groups)
    assert not (tmp_path / "evil").exists()


class _EarlyEnums(pickle._Pickler):
    """Pickles members of enums as Python 3.11.0 to 3.11.3 do, Debian 12's among them."""

    def reducer_override(self, value: object):
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


class AnyAttribute:
    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def early(value: object) -> bytes:
    out = io.BytesIO()
    _EarlyEnums(out).dump(value)
    return out.getvalue()


def test_metadata_of_any_python_are_read_and_getattr_gives_nothing_else(tmp_path, groups):
    path = save(tmp_path, 5, groups)
    files = set(read_json(path / "manifest.json")["files"])
    metadata = torch_dist.read_metadata(path, files)
    (path / ".metadata").write_bytes(early(metadata))
    assert b"getattr" in (path / ".metadata").read_bytes()
    assert torch_dist.read_metadata(path, files) == metadata
    memory_format = torch_dist._MEM_FORMAT_ENCODING
    for arguments in ((memory_format, "__class__"), (memory_format, "mro"), (type(metadata), "__init__"), (1, "real")):
        (path / ".metadata").write_bytes(pickle.dumps(AnyAttribute(*arguments)))
        with pytest.raises(ValueError, match=f"{arguments[1]!r} of .* has no place there"):
            torch_dist.read_metadata(path, files)


def die_in(place: str) -> None:
    """Make this process SIGKILL itself at a place in a save."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if place == "writing":  # tensors are in the file, nothing is flushed
        torch.distributed.checkpoint.filesystem.os.fsync = die
    else:
        owner = {"describe_file": target_checkpoint, "finish": torch_dist.Writer}.get(place, target_checkpoint)
        setattr(owner, place, die)


def save_and_die(folder: str, place: str, asynchronous: bool) -> None:
    with grouped(layout()) as groups:
        save(folder, 5, groups)
        die_in(place)
        pending = start_save(folder, 10, target_of(groups, 10), groups, shared={}, asynchronous=asynchronous)
        pending.finish()


PLACES = ("writing", "describe_file", "finish", "write_json", "set_aside", "publish")


def test_a_kill_in_a_save_leaves_the_checkpoint_before(tmp_path, groups):
    """A real SIGKILL: while tensors are written, before their digest, metadata, manifest and rename, and after."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "numpy", "tests.targets"])
    children = []
    for number, place in enumerate((*PLACES, "keep_last")):
        arguments = (str(tmp_path / place), place, bool(number % 2))
        children.append(context.Process(target=save_and_die, args=arguments))
        children[-1].start()
    for child in children:
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
    for place in PLACES:
        folder, target = tmp_path / place, target_of(groups)
        path = checkpoint.latest(folder)
        assert path.name == "step_00000005"
        assert list(folder.glob(".step_00000010.tmp"))
        assert load_target_weights_from(path, target, groups) == {"step": 5}
        assert same(weights_of(target), weights_of(target_of(groups, 5)))
        save(folder, 10, groups)
        assert sorted(entry.name for entry in folder.iterdir()) == ["step_00000005", "step_00000010"]
    assert checkpoint.latest(tmp_path / "keep_last").name == "step_00000010"


def digests(path: Path) -> list[str]:
    """Of weights and optimizer state, rank by rank."""
    files = checkpoint.read_manifest(path)["files"]
    return [files[name]["sha256"] for name in sorted(files) if name.endswith(".distcp")]


def train_and_save(rank: int, world_size: int, prefix: str, folder: str) -> tuple:
    """Losses with and without asynchronous saving, what was saved, and what a rank's failure does to the others."""
    outcomes = []
    with grouped(layout()) as groups:
        for name in ("synchronous", "asynchronous"):
            saving = CheckpointConfig(save_interval=2, keep=3, async_save=name == "asynchronous")
            result, entries = train(setup_of(groups), segment_of(prefix, 9), Path(folder) / name, saving=saving)
            saved = {path.name: digests(path) for path in result.checkpoint.parent.glob("step_*")}
            outcomes.append(([entry["loss"] for entry in entries], saved))
        write = torch_dist.Writer.write

        def fail_on_the_last(writer) -> list[str]:
            if rank == world_size - 1:
                raise OSError(28, "No space left on device")
            return write(writer)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="rank 1 .*No space left"):
            patch.setattr(torch_dist.Writer, "write", fail_on_the_last)
            saving = CheckpointConfig(save_interval=2, async_save=True)
            train(setup_of(groups), segment_of(prefix, 12), Path(folder) / "asynchronous", saving=saving)
        path = checkpoint.latest(Path(folder) / "asynchronous" / "segment")
        outcomes.append(path.name)
        if groups.is_main:  # each file is looked at by one rank of the node; every rank learns what it found
            with open(path / "common.pt", "r+b") as file:
                file.write(b"damage")
        barrier(groups)
        with pytest.raises(ValueError, match="found a wrong checksum in .*common.pt"):
            load_target_weights_from(path, target_of(groups), groups)
    return tuple(outcomes)


def test_asynchronous_saving_changes_no_number_and_fails_on_every_rank(tmp_path):
    prefix = make_corpus(tmp_path / "corpus")
    ranks = run_distributed(train_and_save, 2, prefix, str(tmp_path))
    for synchronous, asynchronous, newest in ranks:
        assert synchronous == asynchronous
        assert sorted(asynchronous[1]) == ["step_00000006", "step_00000008", "step_00000009"]
        assert newest == "step_00000009"
    assert len(ranks[0][0][0]) == 9
