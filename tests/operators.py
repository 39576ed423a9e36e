# SPDX-License-Identifier: Apache-2.0
"""The operators as tests see them: their inputs, their options, and what each argument is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mambablock
from mambablock import reference

LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (torch.float64, *LOW_PRECISION)

Tensors = dict[str, Tensor | None]


def _random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _conv_inputs(
    batch: int = 2,
    length: int = 9,
    d_inner: int = 5,
    width: int = 4,
    *,
    states: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensors:
    wide = _accumulator(dtype)
    return {
        "x": _random(dtype, batch, length, d_inner),
        "weight": _random(wide, d_inner, width),
        "bias": _random(wide, d_inner),
        "initial_state": _random(wide, batch if states is None else states, width - 1, d_inner),
    }


def _scan_inputs(
    batch: int = 2,
    length: int = 9,
    d_inner: int = 4,
    d_state: int = 3,
    groups: int | None = None,
    *,
    states: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensors:
    wide = _accumulator(dtype)
    group = () if groups is None else (groups,)
    return {
        "u": _random(dtype, batch, length, d_inner),
        "delta": _random(dtype, batch, length, d_inner),
        "A": -torch.rand(d_inner, d_state, dtype=wide) * 2 - 0.1,
        "B": _random(dtype, batch, length, *group, d_state),
        "C": _random(dtype, batch, length, *group, d_state),
        "D": _random(wide, d_inner),
        "z": _random(dtype, batch, length, d_inner),
        "delta_bias": _random(wide, d_inner),
        "initial_state": _random(wide, batch if states is None else states, d_inner, d_state),
    }


def _conv_update_inputs(batch: int = 3, d_inner: int = 5, *sizes: Any, **options: Any) -> Tensors:
    return _one_step(CONV, _conv_inputs(batch, 1, d_inner, *sizes, **options))


def _scan_update_inputs(batch: int = 3, d_inner: int = 4, *sizes: Any, **options: Any) -> Tensors:
    return _one_step(SCAN, _scan_inputs(batch, 1, d_inner, *sizes, **options))


def _one_step(op: Operator, tensors: Tensors) -> Tensors:
    step = {n: t[:, 0] if n in op.activations else t for n, t in tensors.items()}
    return {"state": step.pop("initial_state"), **step}


@dataclass(frozen=True, repr=False)
class Operator:
    """An operator. Calling it calls the public function, flag set, with the final state."""

    name: str
    make_inputs: Callable[..., Tensors]  # in the schema's order, all but cu_seqlens, state_indices
    activations: tuple[str, ...]  # of one type, which the first one sets
    parameters: tuple[str, ...]  # float32 or of the activations' type
    flag: str  # of the nonlinearity

    def __repr__(self) -> str:
        return self.name

    @property
    def is_update(self) -> bool:
        return self.name.endswith("_update")

    @property
    def options(self) -> dict[str, Any]:
        return {self.flag: True} | ({} if self.is_update else {"return_final_state": True})

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(mambablock, self.name)

    @property
    def schema(self) -> list[str]:
        """The names of torch.ops' arguments."""
        return [a.name for a in self.overload._schema.arguments]

    def of_type(self, kind: str) -> tuple[str, ...]:
        arguments = self.overload._schema.arguments
        return tuple(a.name for a in arguments if str(a.type) == kind)

    @property
    def required(self) -> tuple[str, ...]:
        return self.of_type("Tensor")

    @property
    def optional(self) -> tuple[str, ...]:
        return self.of_type("Optional[Tensor]")

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.mambablock, self.name).default

    @property
    def backward(self) -> Any:
        return getattr(torch.ops.mambablock, f"{self.name}_backward").default

    def __call__(self, **arguments: Any) -> Any:
        return self.function(**(self.options | arguments))

    def reference(self, **arguments: Any) -> Any:
        return getattr(reference, self.name)(**(self.options | arguments))

    def arguments(self, **given: Any) -> dict[str, Any]:
        """All arguments of torch.ops, in their order."""
        defaults = {self.flag: True, "reverse": False, "A_is_log": False, "save_states": True}
        given = dict.fromkeys(self.optional) | defaults | given
        return {name: given[name] for name in self.schema}

    def backward_arguments(self, **given: Any) -> dict[str, Any]:
        """The same for the backward, with the outputs in place of their gradients."""
        forward = self.arguments(**given)
        outputs = zip(
            ("dy", "dfinal_state", "saved_states"), self.overload(**forward), strict=False
        )
        forward.pop("save_states", None)
        return dict(outputs) | forward

    def inputs_without(self, *absent: str) -> Tensors:
        """Inputs with every optional argument but these."""
        if self.is_update:
            tensors = self.make_inputs() | {"state_indices": torch.tensor([2, -1, 0])}
        elif "cu_seqlens" in absent:
            tensors = self.make_inputs()
        else:
            tensors = self.make_inputs(1, states=3) | {"cu_seqlens": torch.tensor([0, 4, 4, 9])}
        return tensors | dict.fromkeys(absent)

    def steps(self, tensors: Tensors, begin: int, end: int) -> Tensors:
        """The arguments for a piece of time."""
        return tensors | {name: tensors[name][:, begin:end] for name in self.activations}


CONV = Operator(
    "causal_conv1d",
    _conv_inputs,
    activations=("x",),
    parameters=("weight", "bias"),
    flag="silu",
)
SCAN = Operator(
    "selective_scan",
    _scan_inputs,
    activations=("u", "delta", "B", "C", "z"),
    parameters=("A", "D", "delta_bias"),
    flag="delta_softplus",
)
CONV_UPDATE = replace(CONV, name="causal_conv1d_update", make_inputs=_conv_update_inputs)
SCAN_UPDATE = replace(SCAN, name="selective_state_update", make_inputs=_scan_update_inputs)
OVER_TIME = (CONV, SCAN)
UPDATES = (CONV_UPDATE, SCAN_UPDATE)
OPERATORS = OVER_TIME + UPDATES


def subsets(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return chain.from_iterable(combinations(names, n) for n in range(len(names) + 1))


over_time = pytest.mark.parametrize("op", OVER_TIME, ids=str)
updates = pytest.mark.parametrize("op", UPDATES, ids=str)
all_operators = pytest.mark.parametrize("op", OPERATORS, ids=str)
absences = pytest.mark.parametrize(
    ("op", "absent"), [(op, names) for op in OPERATORS for names in subsets(op.optional)], ids=str
)


def as_dtype(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: None if t is None else t.to(dtype) for name, t in tensors.items()}


class Calls(TorchDispatchMode):
    """Records the operators that run: name, arguments by name, output."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[str, dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        self.recorded.append((func.name(), dict(zip(names, args, strict=False)), output))
        return output

    def of(self, name: str) -> list[dict[str, Any]]:
        """The arguments of each call of an operator."""
        return [arguments for called, arguments, _ in self.recorded if called == name]
