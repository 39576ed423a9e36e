# SPDX-License-Identifier: Apache-2.0
"""Errors in the names and the layout of the function that the user called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from .. import _checks as check

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# Per argument the names of its dimensions, or all forms that it may have.
Forms = Mapping[str, str | tuple[str, ...]]

_operators = ("causal_conv1d", "causal_conv1d_update", "selective_scan", "selective_state_update")
_derived_sizes: dict[str, Callable[[dict[str, int]], int]] = {
    "1": lambda sizes: 1,
    "2 * dim": lambda sizes: 2 * sizes["dim"],
    "2 * dstate": lambda sizes: 2 * sizes["dstate"],
    "2 * seqlen": lambda sizes: 2 * sizes["seqlen"],
    "width - 1": lambda sizes: sizes["width"] - 1,
}


def explained(
    forms: Forms | Callable[..., Forms],
    indices: tuple[str, ...] = (),
    may_be_complex: tuple[str, ...] = (),
    owner: str | None = None,
    **names: str,
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Where the function fails, say which of its arguments is not as `forms` has it.

    The operators check the same and more, but report their own names and layout. Nothing is checked
    here before something fails, so that decoding is as fast as without.

    Args:
        forms: of the tensors, or a function of the arguments that gives them. A dimension has the
            same size wherever it is named; tensors are floating and on the device of the first.
        indices: the tensors that are int32 or int64 instead.
        may_be_complex: the tensors that may be complex.
        owner: whose name errors have, if not the function's.
        names: the operators' names of arguments that the function calls otherwise.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        called, signature = owner or function.__name__, inspect.signature(function)
        optional = {n for n, p in signature.parameters.items() if "None" in str(p.annotation)}

        @wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            try:
                return function(*args, **kwargs)
            except NotImplementedError:
                raise
            except Exception as error:
                failure = error
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:
                raise failure from None
            given = {n: v for n, v in given.items() if v is not None or n not in optional}
            known = forms(**given) if callable(forms) else forms
            _find_fault(called, given, known, indices, may_be_complex)
            operator, _, text = str(failure).partition(": ")
            if operator not in _operators:
                raise failure
            argument, _, text = text.partition(" ")
            raise type(failure)(f"{called}: {names.get(argument, argument)} {text}") from None

        return call

    return decorate


def _find_fault(
    owner: str,
    given: dict[str, Any],
    forms: Forms,
    indices: tuple[str, ...],
    may_be_complex: tuple[str, ...],
) -> None:
    sizes: dict[str, int] = {}
    first = None
    for name in (name for name in forms if name in given):
        value, texts = given[name], forms[name]
        dims = [tuple(t.split(", ")) for t in ((texts,) if isinstance(texts, str) else texts)]
        named = {dim for form in dims for dim in form}
        sizes |= {dim: size(sizes) for dim, size in _derived_sizes.items() if dim in named}
        check.tensor(owner, name, value, sizes, *dims)
        if name not in indices:
            if not (name in may_be_complex and value.is_complex()):
                check.floating(owner, name, value)
        elif value.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{owner}: {name} must be int32 or int64; got {value.dtype}")
        first = first or (name, value)
        check.device(owner, name, value, *first)
        if "rows" in sizes and name in indices and value.is_cpu and (value >= sizes["rows"]).any():
            raise ValueError(
                f"{owner}: {name} must be below the state's {sizes['rows']} rows; got {value.max()}"
            )
    groups, dim = sizes.get("groups", 1), sizes["dim"] * sizes.get("heads", 1)
    if groups < 1 or dim % groups:
        raise ValueError(f"{owner}: groups must be a divisor of dim={dim}; got {groups}")
