"""Checkpoints of the target that load at any tensor x pipeline x data-parallel layout, by megatron-core's
dist_checkpointing (``torch_dist``), complete or not there.

A folder ``step_00000100/`` holds one ``__RANK_0.distcp`` per writing rank, ``.metadata`` (where each tensor's boxes
lie), ``common.pt`` (plain values), ``metadata.json`` (megatron-core's mark) and ``manifest.json``.
"""

from __future__ import annotations

import shutil
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.metadata import Metadata

from megatron_bliss.base.checkpoint import (
    FORMAT,
    MANIFEST,
    describe_file,
    keep_last,
    save_state,
    set_aside,
    step_folder,
    temporary_folder,
    verify,
)
from megatron_bliss.base.files import publish, sync_folder, write_json
from megatron_bliss.base.parallel import Groups, all_gather_object, fail_together, failing_together, max_over_ranks
from megatron_bliss.target import torch_dist
from megatron_bliss.target.model import Target
from megatron_bliss.target.state import (
    MOMENTS,
    OPTIMIZER_PREFIX,
    Moments,
    Piece,
    make_optimizer_state,
    moment_shards,
    optimizer_shards,
    optimizer_step,
    pieces,
    weight_shards,
)

MAIN_WEIGHTS = f"{OPTIMIZER_PREFIX}param."


class Save:
    """A checkpoint on its way to disk; nothing is under its name before :meth:`finish`."""

    def __init__(self, path: Path, groups: Groups, keep: int, manifest: dict, plan: tuple) -> None:
        self.path, self._groups, self._keep, self._manifest = path, groups, keep, manifest
        self._writer, self._metadata = plan
        self._files: dict[str, dict] = {}
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Write this rank's file beside the training."""
        self._thread = threading.Thread(target=self._write, name=f"save {self.path.name}")
        self._thread.start()

    def _write(self) -> None:
        try:
            folder = temporary_folder(self.path)
            self._files = {name: describe_file(folder / name) for name in self._writer.write()}
        except Exception as error:  # raised again by finish, on every rank
            self._error = error

    def is_written(self) -> bool:
        """Collective: whether every rank has written its file."""
        is_busy = self._thread is not None and self._thread.is_alive()
        return not max_over_ranks(float(is_busy), self._groups)

    def wait(self) -> None:
        """Wait for this rank's thread, if any: nothing writes to the folder any more. Not collective."""
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> Path:
        """Collective: wait for the files, complete the checkpoint, give it its name, drop all but the newest ``keep``.

        Where a rank could not write, every rank raises and the checkpoints there are stay as they were.
        """
        if self._thread is None:
            self._write()
        self.wait()
        fail_together(self._error, self._groups)
        written = all_gather_object((self._writer.results, self._files), self._groups)
        with failing_together(self._groups):
            if self._groups.is_main:
                self._complete(written)
        return self.path

    def _complete(self, written: list[tuple[list, dict]]) -> None:
        folder = temporary_folder(self.path)
        self._writer.finish(self._metadata, [results for results, _ in written])
        files = {name: entry for _, entries in written for name, entry in entries.items()}
        for path in sorted(folder.iterdir()):
            if path.name not in files:
                files[path.name] = describe_file(path)
        write_json(folder / MANIFEST, {**self._manifest, "files": files})
        sync_folder(folder)
        set_aside(self.path)
        publish(folder, self.path)
        keep_last(self.path.parent, self._keep)


def start_save(
    folder: str | Path,
    step: int,
    target: Target,
    groups: Groups,
    *,
    shared: dict[str, Any],
    optimizer: MegatronOptimizer | None = None,
    keep: int = 2,
    asynchronous: bool = False,
) -> Save:
    """Collective: begin to write checkpoint ``step``; call :meth:`Save.finish` before the next one.

    ``shared`` are plain values, the main rank's are written. Without ``optimizer`` the checkpoint has weights only.
    ``asynchronous`` copies what this rank writes to host memory (its share of weights and optimizer state) and writes
    in a thread, so that training can go on; else :meth:`Save.finish` writes.
    """
    path = step_folder(folder, step)
    temporary = temporary_folder(path)
    parts = pieces(target, groups)
    shards = weight_shards(parts)
    common = {"shared": shared}
    if optimizer is not None:
        make_optimizer_state(optimizer)
        shards += optimizer_shards(optimizer, parts)
        common["optimizer_step"] = int(max_over_ranks(optimizer_step(optimizer), groups))
    shards = [shard for shard in shards if is_main_replica(shard.replica_id)]
    with failing_together(groups):
        if groups.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_state(temporary / torch_dist.COMMON, common)
            save_config(CheckpointingConfig("torch_dist", 1), str(temporary))
    if asynchronous:
        shards = [replace(shard, data=_host_copy(shard.data)) for shard in shards]
    manifest = {
        "format": FORMAT,
        "step": step,
        **groups.sizes,
        "vocab_size": target[0].real_vocab_size,
        "architecture": asdict(target[0].architecture),
        "params_dtype": str(target[0].config.params_dtype).removeprefix("torch."),
        "optimizer": optimizer is not None,
    }
    save = Save(path, groups, keep, manifest, torch_dist.plan_save(shards, temporary))
    if asynchronous:
        save.start()
    return save


def _host_copy(tensor):
    return tensor.detach().to("cpu", copy=True)


def save_target(
    folder: str | Path,
    step: int,
    target: Target,
    groups: Groups,
    *,
    shared: dict[str, Any],
    optimizer: MegatronOptimizer | None = None,
    keep: int = 2,
) -> Path:
    """Collective: write checkpoint ``step`` and drop all but the ``keep`` newest; see :func:`start_save`."""
    return start_save(folder, step, target, groups, shared=shared, optimizer=optimizer, keep=keep).finish()


def load_target_weights_from(path: str | Path, target: Target, groups: Groups) -> dict[str, Any]:
    """Collective: read the weights of a checkpoint of any layout into the target; returns its ``shared`` values.

    Files are verified first. ValueError on every rank where one is damaged, or the checkpoint is of other sizes.
    """
    parts = pieces(target, groups)
    metadata = _open(path, target, parts, groups)
    return _read(path, metadata, weight_shards(parts))["shared"]


def load_target_and_optimizer(
    path: str | Path, target: Target, optimizer: MegatronOptimizer, groups: Groups
) -> dict[str, Any]:
    """Collective: the same with the optimizer's state; a checkpoint of weights alone leaves the optimizer new."""
    parts = pieces(target, groups)
    metadata = _open(path, target, parts, groups)
    names = metadata.state_dict_metadata
    if not any(name.startswith(OPTIMIZER_PREFIX) for name in names):
        common = _read(path, metadata, weight_shards(parts))
        optimizer.reload_model_params()
        return common["shared"]
    make_optimizer_state(optimizer)
    shards = optimizer_shards(optimizer, parts)
    has_main_weights = any(name.startswith(MAIN_WEIGHTS) for name in names)
    if not has_main_weights:  # saved by a run in fp32
        shards = [shard for shard in shards if not shard.key.startswith(MAIN_WEIGHTS)]
    common = _read(path, metadata, weight_shards(parts) + shards)
    if not has_main_weights:
        optimizer.reload_model_params()
    make_optimizer_state(optimizer, common["optimizer_step"])
    return common["shared"]


def load_moments(path: str | Path, target: Target, groups: Groups) -> Moments:
    """Collective: the moments with which training would go on from a checkpoint of any layout.

    ValueError on every rank where the checkpoint has weights only.
    """
    parts = pieces(target, groups)
    metadata = _open(path, target, parts, groups)
    if not any(name.startswith(OPTIMIZER_PREFIX) for name in metadata.state_dict_metadata):
        raise ValueError(
            f"found weights only in checkpoint {path}, expected the optimizer's moments, too: give one that training "
            "saved, or set baselines.mates.optimizer to sgd"
        )
    pairs = {
        id(parameter): tuple(torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False) for _ in MOMENTS)
        for chunk in target
        for parameter in chunk.parameters()
    }
    common = _read(path, metadata, moment_shards(parts, pairs))
    return Moments(common["optimizer_step"], list(pairs.values()))


def _read(path: str | Path, metadata: Metadata, shards: list[ShardedTensor]) -> dict[str, Any]:
    return dist_checkpointing.load(
        {str(number): shard for number, shard in enumerate(shards)},
        str(path),
        sharded_strategy=torch_dist.LoadShards(metadata),
        common_strategy=torch_dist.LoadCommon(),
        validate_access_integrity=False,  # boxes of the optimizer are no regular grid
    )


def _open(path: str | Path, target: Target, parts: list[Piece], groups: Groups) -> Metadata:
    """Collective: verify the files and compare the weights' names and shapes with the target's."""
    manifest, metadata = verify(path, groups), None
    shapes = {part.shard.key: part.shard.global_shape for part in parts}
    padded = {part.shard.key for part in parts if part.shard.allow_shape_mismatch}
    everyones = all_gather_object((shapes, padded), groups)
    with failing_together(groups):
        metadata = torch_dist.read_metadata(path, set(manifest["files"]))
        expected = {name: shape for shapes, _ in everyones for name, shape in shapes.items()}
        _check_vocabulary(path, manifest["vocab_size"], target[0].real_vocab_size)
        _check_shapes(metadata, expected, set().union(*(padded for _, padded in everyones)))
    return metadata


def _check_vocabulary(path: str | Path, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(
            f"found a vocabulary of {found} tokens in checkpoint {path}, expected {expected}: use the tokenizer that "
            "the target was trained with"
        )


def _check_shapes(metadata: Metadata, expected: dict[str, tuple], padded: set[str]) -> None:
    """The rows of embedding and output matrix may differ: their padding past the vocabulary is zero and unused."""
    names = metadata.state_dict_metadata
    found = {name: tuple(entry.size) for name, entry in names.items() if not name.startswith(OPTIMIZER_PREFIX)}
    for name in sorted(expected.keys() | found.keys()):
        skip = int(name in padded)
        own, saved = expected.get(name), found.get(name)
        if own is None or saved is None or tuple(own[skip:]) != saved[skip:]:
            raise ValueError(
                f"found {name} of shape {saved} in the checkpoint, expected {own and tuple(own)}: the target's sizes "
                "(or the tokenizer) differ from those it was saved with"
            )
