"""Bytes that the collectives of a real step send, counted as they are made."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

RINGS = {
    "allreduce_": (0, 2),
    "allreduce_coalesced_": (0, 2),
    "_allgather_base_": (0, 1),
    "allgather_into_tensor_coalesced_": (0, 1),
    "_reduce_scatter_base_": (1, 1),
    "reduce_scatter_tensor_coalesced_": (1, 1),
}
"""Collective -> which of its arguments is the whole message, and how often (g - 1)/g of it is sent by each of g."""
SMALL = 64
"""Bytes of a message up to which it is single numbers."""


class CountedBytes(TorchDispatchMode):
    """``sent``: operation -> bytes that this rank has sent inside of the mode, single numbers left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count what is a collective; run everything as it is."""
        namespace, name = func.name().split("::")
        name = name.split(".")[0]
        if namespace == "c10d" and (name in RINGS or name == "send"):
            place, rings = RINGS.get(name, (0, 0))
            size = _size(args[place])
            if size > SMALL:
                ranks = _group_size(args)
                self.sent[name] += size * rings * (ranks - 1) // ranks if rings else size
        return func(*args, **(kwargs or {}))


def _size(message: torch.Tensor | list[torch.Tensor]) -> int:
    tensors = [message] if isinstance(message, torch.Tensor) else message
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _group_size(args: tuple) -> int:
    """Ranks of the process group among an operation's arguments, where torch holds it in a box."""
    (box,) = (one for one in args if isinstance(one, torch.ScriptObject) and "ProcessGroup" in str(one._type()))
    return dist.ProcessGroup.unbox(box).size()
