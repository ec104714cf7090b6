"""megatron-core's ``torch_dist`` format, written without other processes and read without trusting its pickles.

megatron-core's own writer starts a manager process and forks workers, which a daemon, an open CUDA context or threads
do not allow; where one rank cannot write ``common.pt`` or ``.metadata`` the others wait for it for ever. Here a rank
writes its one file itself, from any thread, and the steps that one rank alone does are the caller's.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)

from megatron_bliss.base.checkpoint import load_state

METADATA = ".metadata"
COMMON = "common.pt"


def by_key(shards: list[ShardedTensor]) -> dict[str, list[ShardedTensor]]:
    """A rank may hold several boxes of one tensor."""
    grouped: dict[str, list[ShardedTensor]] = {}
    for shard in shards:
        grouped.setdefault(shard.key, []).append(shard)
    return grouped


class Writer(FileSystemWriter):
    """Writes this rank's boxes to one file and flushes it; plan and writing are apart, so that a thread can write."""

    def __init__(self, folder: str | Path) -> None:
        # Copying ahead asks CUDA for a stream, and a thread that never chose a device gets that of GPU 0: every rank
        # would open a context there, in memory that rank 0 counts on.
        super().__init__(folder, single_file_per_rank=True, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
        self.results: list = []

    def prepare_write_data(self, plan, planner) -> None:
        self._plan, self._planner = plan, planner

    def write(self) -> list[str]:
        """Names of the files written; fills ``results``, of which the metadata is made."""
        self.results = self.write_data(self._plan, self._planner).value()
        del self._plan, self._planner  # and with them the tensors
        return sorted({result.storage_data.relative_path for result in self.results})

    def storage_meta(self) -> StorageMeta:
        """Without the path it was written to, which is a temporary one."""
        return StorageMeta()


def plan_save(shards: list[ShardedTensor], folder: str | Path) -> tuple[Writer, Metadata | None]:
    """Collective: decide who writes what. The main rank gets the metadata to finish with.

    Raises on every rank where the boxes of all ranks overlap or leave a gap in a tensor.
    """
    state = mcore_to_pyt_state_dict(by_key(shards), is_loading=False)
    planner = MCoreSavePlanner(
        dedup_replicated_tensors=False, flatten_state_dict=False, can_run_decentralized_global_plan=False
    )
    (writer, metadata, _), *_ = save_state_dict_async_plan(state, Writer(folder), planner=planner)
    return writer, metadata


def _memory_format(kind: object, name: object) -> _MEM_FORMAT_ENCODING:
    """Stands for ``getattr``, which a pickle could use to reach anything: a member of this one enum or an error."""
    if kind is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"{name!r} of {kind!r} has no place there")
    return _MEM_FORMAT_ENCODING[name]


class _MetadataUnpickler(pickle.Unpickler):
    """Makes what a ``.metadata`` file may hold, and calls nothing else that a pickle could name."""

    ALLOWED = {
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "float64", "float32", "float16", "bfloat16"},
    }

    def find_class(self, module: str, name: str):
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 pickle a member of an enum
            return _memory_format
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place there")
        return super().find_class(module, name)


def read_metadata(folder: str | Path, files: set[str]) -> Metadata:
    """The tensors of a checkpoint and where their boxes lie, all in ``files``; ValueError for anything else."""
    path = Path(folder) / METADATA
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        places = {info.relative_path for info in metadata.storage_data.values()}
        kinds = {type(entry) for entry in metadata.state_dict_metadata.values()}
    except (pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"found {error} in {path}, expected a list of tensors: do not use this checkpoint") from error
    if not isinstance(metadata, Metadata) or kinds - {TensorStorageMetadata} or places - files:
        raise ValueError(f"found other than tensors of this checkpoint in {path}: do not use this checkpoint")
    return metadata


class _Reader(FileSystemReader):
    """Reads tensors by metadata that was read with care."""

    def __init__(self, folder: str | Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._known = metadata

    def read_metadata(self, *_: object, **__: object) -> Metadata:
        return self._known


class LoadShards(TorchDistLoadShardedStrategy):
    """Collective: fill shards in place."""

    def __init__(self, metadata: Metadata) -> None:
        super().__init__()
        self.metadata = metadata

    def load(self, sharded_state_dict: dict[str, ShardedTensor], checkpoint_dir: str | Path) -> dict:
        shards = list(sharded_state_dict.values())
        state = mcore_to_pyt_state_dict(by_key(shards), is_loading=True)
        planner = MCoreLoadPlanner(
            shapes_validation_sharded_tensors=[shard for shard in shards if not shard.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={shard.key: shard for shard in shards if shard.allow_shape_mismatch},
        )
        torch_checkpoint.load(state, storage_reader=_Reader(checkpoint_dir, self.metadata), planner=planner)
        return {name: shard.data for name, shard in sharded_state_dict.items()}


class LoadCommon(TorchCommonLoadStrategy):
    """Plain values, read as weights only whatever torch's default or environment says."""

    def load_common(self, checkpoint_dir: str | Path) -> dict:
        return load_state(Path(checkpoint_dir) / COMMON)
