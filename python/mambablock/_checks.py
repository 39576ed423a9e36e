# SPDX-License-Identifier: Apache-2.0
"""Argument checks in Python, all of one form: `owner: argument must be <expected>; got <what>`."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

_floating_types = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Names of a tensor's dimensions.
Dims = tuple[str, ...]


def got(value: object) -> str:
    """Numbers and text as they are, anything else by its type."""
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    plain = value is None or isinstance(value, (str, int, float, torch.dtype))
    return repr(value) if plain else type(value).__name__


def integers(owner: str, **values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
            raise TypeError(f"{owner}: {name} must be an integer; got {got(value)}")


def numbers(owner: str, **values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{owner}: {name} must be a number; got {got(value)}")
        if not math.isfinite(value):
            raise ValueError(f"{owner}: {name} must be finite; got {value}")


def positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{owner}: {name} must be positive; got {value}")


def not_negative(owner: str, **values: float) -> None:
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{owner}: {name} must not be negative; got {value}")


def flags(owner: str, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{owner}: {name} must be True or False; got {got(value)}")


def dtype(owner: str, dtype: object) -> None:
    if dtype is not None and dtype not in _floating_types:
        error = ValueError if isinstance(dtype, torch.dtype) else TypeError
        *others, last = map(str, _floating_types)
        expected = f"{', '.join(others)} or {last}"
        raise error(f"{owner}: dtype must be {expected}; got {got(dtype)}")


def tensor(owner: str, argument: str, value: object, sizes: dict[str, int], *forms: Dims) -> None:
    """A tensor of one of the `forms`; a dimension's size is in `sizes`, or is entered there."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {argument} must be a Tensor; got {got(value)}")
    shape = value.shape
    for dims in forms:
        if len(dims) == len(shape):
            found = dict(zip(dims, shape, strict=True))
            if all(sizes.get(dim, size) == size for dim, size in found.items()):
                sizes |= found
                return
    named = {dim: f"{dim}={size}" for dim, size in sizes.items() if dim != str(size)}
    expected = (f"({', '.join(named.get(dim, dim) for dim in dims)})" for dims in forms)
    raise ValueError(f"{owner}: {argument} must be {' or '.join(expected)}; got {tuple(shape)}")


def device(owner: str, argument: str, tensor: Tensor, like: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{owner}: {argument} must be on {other.device} as {like}; got {tensor.device}"
        )


def floating(owner: str, argument: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{owner}: {argument} must be of a floating type; got {tensor.dtype}")


def autocasts(device: str) -> bool:
    """Whether autocast converts the inputs of matrix products on this type of device."""
    return device != "meta" and torch.is_autocast_enabled(device)
