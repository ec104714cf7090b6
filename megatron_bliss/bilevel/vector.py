"""Vectors in parameter space: one flat tensor, seen by parameter name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class ParameterVector(dict):
    """{parameter name: tensor of the parameter's shape}, every tensor a view of the one tensor ``flat``.

    Layers add to their parts by name; a sum, a product or an all-reduce of the whole is one operation on ``flat``. The
    order is that of ``model.named_parameters()``, a tied matrix once, so that ``flat`` [number of parameters] equals
    ``torch.nn.utils.parameters_to_vector`` of the same values.
    """

    def __init__(self, model: nn.Module, flat: Tensor):
        super().__init__()
        offset = 0
        for name, parameter in model.named_parameters():
            self[name] = flat[offset : offset + parameter.numel()].view(parameter.shape)
            offset += parameter.numel()
        assert offset == flat.numel(), f"a flat tensor of {flat.numel()} elements for {offset} parameters"
        self.flat = flat


def parameter_total(model: nn.Module) -> int:
    """Elements of all parameters, a tied matrix once."""
    return sum(parameter.numel() for parameter in model.parameters())


def zeros(model: nn.Module) -> ParameterVector:
    """The zero vector of the model's parameter space."""
    parameter = next(model.parameters())
    flat = torch.zeros(parameter_total(model), dtype=accumulation_dtype(parameter.dtype), device=parameter.device)
    return ParameterVector(model, flat)


def as_vector(model: nn.Module, vector: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    """``vector``, flat or by name, as tensors by name in the parameters' dtype.

    Raises ValueError when it does not have the model's names and shapes.
    """
    dtype = next(model.parameters()).dtype
    if isinstance(vector, Tensor):
        if vector.shape != (parameter_total(model),):
            raise ValueError(
                f"found a vector of shape {tuple(vector.shape)}, expected ({parameter_total(model)},): one element a"
                " parameter of the model"
            )
        return ParameterVector(model, vector.detach().to(dtype))
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    found = {name: tensor.shape for name, tensor in vector.items()}
    if found != expected:
        names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(f"found a vector that differs from the model's parameters in {', '.join(names[:5])}")
    return {name: tensor.detach().to(dtype) for name, tensor in vector.items()}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: fp32 under bf16 and fp16, else the dtype itself.

    A sum of many micro-batches in bf16 stops growing once its terms are below 1/256 of it.
    """
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out [m, n] += left [m, k] @ right [k, n]; the sum is in out's dtype, the product in that of its factors."""
    if out.dtype == left.dtype:  # no matrix product adds to an output of another dtype
        out.addmm_(left, right)
    else:
        out.add_(left @ right)


def add_by_name(sums: dict[str, Tensor], names: Iterable[str], tensors: Iterable[Tensor]) -> None:
    """Add each tensor to the sum of its name."""
    for name, tensor in zip(names, tensors, strict=True):
        sums[name].add_(tensor)
