"""The border between the user's arrays and ours: NumPy or torch in, the same kind out, float tensors inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from attsvm.errors import InvalidInputError

__all__ = ["Array", "Kind", "as_bool", "as_float", "as_index", "as_tensor", "is_ragged", "kind_of", "pad_ragged"]

Array: TypeAlias = Any
"""A NumPy array, a torch tensor, or nested lists of numbers: what users may pass."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the user's arrays were, so that results go back as what came in."""

    is_torch: bool
    dtype: torch.dtype
    device: torch.device

    def back(self, value: Tensor) -> Any:
        """``value`` as the user's kind: floating values in the user's dtype, others unchanged."""
        if value.is_floating_point():
            value = value.to(self.dtype)
        if self.is_torch:
            return value.to(self.device)
        return value.detach().cpu().numpy()


def kind_of(value: Array) -> Kind:
    """The kind of ``value``; integers and lists count as float64 NumPy arrays."""
    if isinstance(value, (list, tuple)) and len(value) and isinstance(value[0], (Tensor, np.ndarray)):
        value = value[0]
    if isinstance(value, Tensor):
        dtype = value.dtype if value.is_floating_point() else torch.float64
        return Kind(is_torch=True, dtype=dtype, device=value.device)
    array = np.asarray(value) if not is_ragged(value) else np.zeros(0)
    dtype = {np.float32: torch.float32, np.float16: torch.float16}.get(array.dtype.type, torch.float64)
    return Kind(is_torch=False, dtype=dtype, device=torch.device("cpu"))


def as_tensor(value: Array, name: str, *, where: str) -> Tensor:
    """``value`` as a tensor of its own dtype; shares its memory where it can."""
    if isinstance(value, Tensor):
        return value.detach()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InvalidInputError(f"{where}: {name} must be a rectangular array, got ragged lists.") from error
    if array.dtype == object or array.dtype.kind in "USOMm":
        raise InvalidInputError(f"{where}: {name} must hold numbers, got an array of {array.dtype}.")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(np.require(array, requirements=("C", "W")))


def as_float(value: Array, name: str, *, where: str, device: torch.device | None = None) -> Tensor:
    """``value`` as a float32 or float64 tensor (other types become float64); complex values are refused."""
    tensor = as_tensor(value, name, where=where)
    if tensor.is_complex():
        raise InvalidInputError(f"{where}: {name} must hold real numbers, got {tensor.dtype}.")
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.to(torch.float64)
    return tensor if device is None else tensor.to(device)


def as_bool(value: Array, name: str, *, where: str, device: torch.device) -> Tensor:
    """``value`` as a boolean tensor; the integers 0 and 1 are accepted, anything else is refused."""
    tensor = as_tensor(value, name, where=where)
    if tensor.dtype != torch.bool:
        if not bool(((tensor == 0) | (tensor == 1)).all()):
            raise InvalidInputError(f"{where}: {name} must be boolean (True = may be attended), got other values.")
        tensor = tensor == 1
    return tensor.to(device)


def as_index(value: Array, name: str, *, where: str, device: torch.device) -> Tensor:
    """``value`` as an int64 tensor; floats are refused even when they are whole."""
    tensor = as_tensor(value, name, where=where)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InvalidInputError(f"{where}: {name} must hold integers, got {tensor.dtype}.")
    return tensor.to(device=device, dtype=torch.int64)


def is_ragged(value: Array) -> bool:
    """True for a list of arrays whose first axes differ or that are themselves arrays: one item per sequence."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    if all(isinstance(item, (Tensor, np.ndarray)) for item in value):
        return True
    lengths = {len(item) for item in value if isinstance(item, (list, tuple))}
    return len(lengths) > 1


def pad_ragged(items: Any, name: str, *, where: str) -> tuple[Tensor, Tensor]:
    """Stack arrays (T_i, d) into (n, T, d), padded with zeros; also return the (n, T) mask of real tokens."""
    tensors = [as_float(item, f"{name}[{index}]", where=where) for index, item in enumerate(items)]
    for index, tensor in enumerate(tensors):
        if tensor.ndim != 2:
            if tensor.numel() == 0:
                raise InvalidInputError(f"{where}: {name}[{index}] is an empty sequence; every one needs a token.")
            raise InvalidInputError(f"{where}: {name}[{index}] must have shape (T, d), got {tuple(tensor.shape)}.")
        if tensor.shape[1] != tensors[0].shape[1]:
            raise InvalidInputError(
                f"{where}: {name}[{index}] must have {tensors[0].shape[1]} columns as {name}[0] has, "
                f"got {tensor.shape[1]}."
            )
        if tensor.shape[0] == 0:
            raise InvalidInputError(f"{where}: {name}[{index}] is an empty sequence; every one needs a token.")
    padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    lengths = torch.tensor([len(tensor) for tensor in tensors], device=padded.device)
    real = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    return padded, real
