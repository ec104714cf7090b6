"""Tensors that claim to be on a CUDA device, for tests of placement on machines without one.

A :class:`Claimed` wraps a CPU tensor, says ``cuda:0`` when asked for its device, and computes on the CPU: the numbers
are those of a CPU run, ``.item()`` and ``nonzero`` work, and so does autograd. What CUDA refuses is refused: operands
on different devices (but for CPU scalars, CPU indices into a CUDA tensor and copies), ``numpy()`` of a CUDA tensor,
and, as with NCCL, a collective on a CPU tensor.

Inside :func:`claimed_cuda` ``device="cuda"`` gives such tensors. Kernels, streams and NCCL itself are not played.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
CROSSES_DEVICES = ("aten::copy_", "aten::_to_copy")
TAKES_CPU_INDICES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class PlacementError(RuntimeError):
    """What a GPU machine would refuse."""


class Claimed(torch.Tensor):
    """A CPU tensor, ``inner``, under the name of a CUDA one."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Claimed:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="cpu"
        )

    def __init__(self, inner: torch.Tensor) -> None:
        assert type(inner) is torch.Tensor
        self.inner = inner

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Claimed) -> None:
        torch.Tensor.data.__set__(self, other)
        self.inner = other.inner

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __deepcopy__(self, memo: dict) -> Claimed:
        copied = Claimed(self.inner.clone()).requires_grad_(self.requires_grad)
        copied._is_param = isinstance(self, nn.Parameter)
        memo[id(self)] = copied
        return copied

    def __repr__(self) -> str:
        return f"Claimed({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def claim(value):
    """A CPU tensor's numbers on the claimed device; anything else as it is."""
    return Claimed(value) if isinstance(value, torch.Tensor) and not isinstance(value, Claimed) else value


def to_cpu(value):
    """The numbers of a tensor that may be claimed, as a plain tensor."""
    return value.inner if isinstance(value, Claimed) else value


def _compute(func, args: tuple, kwargs: dict):
    """One operation of the dispatcher: refuse or compute, and claim what comes out."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    claimed = [tensor for tensor in tensors if isinstance(tensor, Claimed)]
    _check(func, args, tensors, claimed)
    result = func(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))
    if not claimed:
        return result
    written = _written(func, args, kwargs)
    if written is not None:
        return written
    return tree_map(claim, result)


def _check(func, args: tuple, tensors: list, claimed: list) -> None:
    name = func._schema.name
    if name.startswith("c10d::") and len(claimed) != len(tensors):
        raise PlacementError(f"{name} of a CPU tensor: NCCL takes CUDA tensors only")
    if not claimed or len(claimed) == len(tensors) or name in CROSSES_DEVICES:
        return
    foreign = [tensor for tensor in tensors if not isinstance(tensor, Claimed)]
    if name in TAKES_CPU_INDICES:
        if isinstance(args[0], Claimed):
            values = [value for value in args[2:3] if isinstance(value, torch.Tensor) and value.dim()]
            if all(isinstance(value, Claimed) for value in values):
                return
    elif all(tensor.dim() == 0 for tensor in foreign):
        return
    shapes = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
    raise PlacementError(f"{name} of tensors on different devices: {shapes}")


def _written(func, args: tuple, kwargs: dict):
    """The operand that an in-place operation or one with ``out=`` returns; None for others."""
    schema = func._schema
    if len(schema.returns) != 1 or schema.returns[0].alias_info is None or not schema.returns[0].alias_info.is_write:
        return None
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return kwargs[argument.name] if argument.name in kwargs else args[position]
    return None


class _Operations(TorchDispatchMode):
    """Sees operations on CPU tensors, too: collectives among them are refused."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def _is_cuda(device: object) -> bool:
    return device is not None and not isinstance(device, (int, torch.dtype)) and torch.device(device).type == "cuda"


def _factory(original: Callable) -> Callable:
    """A factory of tensors that reads ``device=`` before torch looks for a driver."""

    @functools.wraps(original)
    def make(*args, device=None, **kwargs):
        if device is None:
            return original(*args, **kwargs)
        if not _is_cuda(device):
            return to_cpu(original(*args, device=device, **kwargs))
        requires_grad = kwargs.pop("requires_grad", False)
        made = claim(original(*args, device="cpu", **kwargs))
        return made.requires_grad_() if requires_grad else made

    return make


def _to(tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """``Tensor.to`` with its device apart from the rest."""
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    flags = [a for a in args if isinstance(a, bool)]
    options = dict(zip(("non_blocking", "copy"), flags, strict=False)) | kwargs
    for argument in args:
        if isinstance(argument, torch.Tensor):
            device, dtype = argument.device, argument.dtype
        elif isinstance(argument, torch.dtype):
            dtype = argument
        elif isinstance(argument, (str, torch.device)):
            device = argument
    moved = ORIGINAL_TO(tensor, dtype or tensor.dtype, **options)
    if device is None or torch.device(device).type == moved.device.type:
        return moved
    return claim(moved.clone()) if _is_cuda(device) else to_cpu(moved).clone()


def _move_module(module: nn.Module, *args, **kwargs) -> nn.Module:
    """``Module.to``, which cannot put a :class:`Claimed` into a plain parameter; attributes of parameters stay."""
    moved: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in moved:
                value = nn.Parameter(_to(parameter.detach(), *args, **kwargs), parameter.requires_grad)
                value.__dict__.update({k: v for k, v in parameter.__dict__.items() if k != "inner"})
                moved[id(parameter)] = value
            owner._parameters[name] = moved[id(parameter)]
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = None if buffer is None else _to(buffer, *args, **kwargs)
    return module


def _refuse_numpy(tensor: torch.Tensor, *args, **kwargs):
    if isinstance(tensor, Claimed):
        raise PlacementError("numpy() of a CUDA tensor: use cpu() first")
    return ORIGINAL_NUMPY(tensor, *args, **kwargs)


def _type_name(tensor: torch.Tensor, *args, **kwargs):
    answer = ORIGINAL_TYPE(to_cpu(tensor), *args, **kwargs)
    if not isinstance(answer, str):
        return claim(answer) if isinstance(tensor, Claimed) else answer
    plain = answer.replace("torch.cuda.", "torch.")
    return plain.replace("torch.", "torch.cuda.") if isinstance(tensor, Claimed) else plain


ORIGINAL_TO, ORIGINAL_NUMPY, ORIGINAL_TYPE = torch.Tensor.to, torch.Tensor.numpy, torch.Tensor.type
ORIGINAL_TOLIST = torch.Tensor.tolist
METHODS: dict[str, Callable] = {
    "to": _to,
    "cuda": lambda tensor, *_, **__: _to(tensor, CUDA),
    "cpu": lambda tensor, *_, **__: _to(tensor, "cpu"),
    "tolist": lambda tensor: ORIGINAL_TOLIST(to_cpu(tensor)),
    "numpy": _refuse_numpy,
    "type": _type_name,
}
FACTORIES = (
    *("zeros", "ones", "empty", "full", "tensor", "as_tensor", "arange", "eye", "linspace", "rand", "randn", "randint"),
    *("zeros_like", "ones_like", "empty_like", "full_like"),
)
NEW = ("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")


@contextlib.contextmanager
def claimed_cuda() -> Iterator[torch.device]:
    """Inside, tensors can be made on and moved to ``cuda`` devices; gives the device to ask for."""
    with contextlib.ExitStack() as stack:
        for name in FACTORIES:
            stack.enter_context(mock.patch.object(torch, name, _factory(getattr(torch, name))))
        for name in NEW:
            stack.enter_context(mock.patch.object(torch.Tensor, name, _factory(getattr(torch.Tensor, name))))
        for name, method in METHODS.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, method))
        stack.enter_context(mock.patch.object(nn.Module, "to", _move_module))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: CUDA))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (8, 0)))
        properties = SimpleNamespace(total_memory=80 * 2**30)
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", lambda *_: properties))
        # pickled objects travel on the device of the backend
        stack.enter_context(mock.patch.object(distributed_c10d, "_get_object_coll_device", lambda group: CUDA))
        stack.enter_context(_Operations())
        yield CUDA
