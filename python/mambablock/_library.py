# SPDX-License-Identifier: Apache-2.0
"""Loads the operator libraries and holds what the operators' Python sides share.

An operator's arguments are listed in its schema; everything here takes their names from there.
"""

from __future__ import annotations

import inspect
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
LIBRARY = "libmambablock.so"


def _load(name: str) -> None:
    """Loads a library from beside the package; ImportError says why it cannot be."""
    path = FOLDER / name
    if not path.exists():
        raise ImportError(
            f"mambablock: {name} is not beside the package; build it with "
            "`pip install --no-build-isolation .` and import from outside of the source tree"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        system = ", ".join((sys.platform, platform.machine(), *platform.libc_ver()))
        raise ImportError(
            f"mambablock: {path} must be for this machine ({system}) and torch "
            f"{torch.__version__}; got {error.__cause__ or error}"
        ) from error


def _load_all() -> None:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise ImportError(
            f"mambablock: expected torch 2.10 or newer; got torch {torch.__version__}"
        )
    # A second copy would register the same operators, and crash.
    if hasattr(torch.ops.mambablock, "selective_scan"):
        loaded = {p.parent for p in map(Path, torch.ops.loaded_libraries) if p.name == LIBRARY}
        if loaded != {FOLDER.resolve()}:
            copies = ", ".join(map(str, sorted(loaded))) or "an unknown folder"
            raise ImportError(
                f"mambablock: a process must have one copy of it; got {copies} and {FOLDER}"
            )
    _load(LIBRARY)
    # Without it a source build has only the CPU's operators.
    if torch.version.cuda is not None and (FOLDER / "libmambablock_cuda.so").exists():
        _load("libmambablock_cuda.so")


_load_all()

# Steps of time for each saved state: kScanTimeTile in csrc/selective_scan/cpu/kernels.h and
# kCudaTile in cuda/kernels.h.
TIME_TILE = {"cpu": 32, "cuda": 16}

VmapRule = Callable[..., tuple[tuple[Tensor, ...], tuple[int | None, ...]]]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of states and sums: float64 for float64 activations, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Arguments


def _operator(op: str) -> Any:
    return getattr(torch.ops.mambablock, op)


def argument_names(op: str) -> list[str]:
    return [argument.name for argument in _operator(op).default._schema.arguments]


def _tensor_arguments(op: str) -> list[tuple[int, str, bool]]:
    """Position, name and whether None is allowed, of each argument that is a tensor."""
    types = [str(argument.type) for argument in _operator(op).default._schema.arguments]
    return [
        (i, name, type_ != "Tensor")
        for i, (name, type_) in enumerate(zip(argument_names(op), types, strict=True))
        if "Tensor" in type_
    ]


def prepared(op: str, activations: Sequence[str] = ()) -> Callable[..., list[Any]]:
    """A function that checks the types of the operator's arguments, as far as they are given, and
    casts the activations, if any, as autocast wants them: to its type where it is on, but for
    float64."""
    tensors = _tensor_arguments(op)
    names = argument_names(op)
    cast = [names.index(name) for name in activations]

    def prepare(*given: Any) -> list[Any]:
        arguments = list(given)
        for i, name, optional in tensors:
            tensor = arguments[i]
            if not isinstance(tensor, Tensor) and not (optional and tensor is None):
                expected = "a Tensor or None" if optional else "a Tensor"
                got = "None" if tensor is None else type(tensor).__name__
                raise TypeError(f"{op}: {name} must be {expected}; got {got}")
        device = arguments[cast[0]].device.type if cast else "meta"
        if device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            for i in cast:
                if arguments[i] is not None and arguments[i].dtype != torch.float64:
                    arguments[i] = arguments[i].to(dtype)
        return arguments

    return prepare


# Fakes


def register_fake(op: str, first: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """torch.library.register_fake for a function of one namespace of all arguments, whose tensors
    are on the device of the argument named `first`."""
    names = argument_names(op)

    def decorate(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def fake(*values: Any) -> Any:
            arguments = SimpleNamespace(**dict(zip(names, values, strict=True)))
            device = getattr(arguments, first).device
            for name, value in vars(arguments).items():
                if isinstance(value, Tensor) and value.device != device:
                    raise RuntimeError(
                        f"{op}: {name} must be on {device} as {first}; got {value.device}"
                    )
            return function(arguments)

        torch.library.register_fake(f"mambablock::{op}")(fake)
        return function

    return decorate


def check_shape(op: str, argument: str, tensor: Tensor, **sizes: int | None) -> None:
    """Raises RuntimeError unless `tensor` has the named sizes, None being any; for fakes."""
    if tensor.dim() != len(sizes) or any(
        expected is not None and got != expected
        for got, expected in zip(tensor.shape, sizes.values(), strict=True)
    ):
        expected = ", ".join(n if size is None else f"{n}={size}" for n, size in sizes.items())
        raise RuntimeError(f"{op}: {argument} must be ({expected}); got {tuple(tensor.shape)}")


def gradient_of_state(activations: Tensor, state: Tensor | None) -> Tensor:
    """What a backward returns for initial_state: where that is absent, an empty tensor."""
    shape = (0,) if state is None else state.shape
    return activations.new_empty(shape, dtype=accumulator_dtype(activations.dtype))


# Gradients and vmap


def differentiable(
    op: str,
    *,
    activations: Sequence[str],
    channels: dict[str, int],
    outputs: dict[str, int],
    grouped: Sequence[str] = (),
) -> Callable[..., tuple[Tensor, ...]]:
    """Registers autograd and vmap of an operator, given that it has a backward operator.

    In both schemas the tensors come first, led by those with a gradient. The backward takes the
    gradients of y and of final_state, the latter None where nobody gave one, then the forward's
    further outputs, which the forward makes if its last argument, save_states, is True, then the
    forward's other arguments. It returns an empty tensor for the gradient of an absent argument.

    Args:
        op: the operator's name.
        activations: the arguments that autocast casts.
        channels: the dimension of the channels of each argument with a gradient, which vmap folds
            the mapped dimension into: channels are independent of each other.
        outputs: the same of the outputs, under the names that the backward has for them.
        grouped: the arguments whose dimension is that of their groups, and may be missing.

    Returns:
        The function that the public one calls with the operator's arguments but for save_states.
    """
    forward, tensors = _operator(op), len(_tensor_arguments(op))
    saves = argument_names(op)[-1] == "save_states"
    prepare, forward_function, backward_function = prepared(op, activations), *_register(op)
    dims = channels | outputs
    for name, function, results in (
        (op, forward_function, outputs),
        (f"{op}_backward", backward_function, channels),
    ):
        function.vmap = staticmethod(_vmap_rule(name, function.apply, dims, results, grouped))
        torch.library.register_vmap(
            f"mambablock::{name}", _vmap_rule(name, _operator(name), dims, results, grouped)
        )

    def call(*given: Any) -> tuple[Tensor, ...]:
        arguments = prepare(*given)
        # An exported program runs forward only, even where it was traced with gradients on.
        train = (
            torch.is_grad_enabled()
            and any(isinstance(a, Tensor) and a.requires_grad for a in arguments[:tensors])
            and not torch.compiler.is_exporting()
        )
        function = forward_function.apply if train else forward
        results: tuple[Tensor, ...] = function(*arguments, *[train] * saves)
        return results

    return call


def _register(op: str) -> tuple[Any, Any]:
    """Registers the operator's autograd; returns the same as autograd.Functions, of the forward and
    of the backward, which torch.func needs."""
    names, tensors = argument_names(op), len(_tensor_arguments(op))
    saves = names[-1] == "save_states"
    own = len(names) - saves
    forward, backward = _operator(op), _operator(f"{op}_backward")

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.materialize_grads = False  # set_materialize_grads, which torch.compile does not know
        ctx.options = inputs[tensors:]
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*inputs[:tensors], *output[2:])

    def run_backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, *_: Any) -> Any:
        kept = ctx.saved_tensors
        arguments, saved = (*kept[:tensors], *ctx.options), kept[tensors:]
        if saves and not arguments[-1]:
            saved = forward(*arguments[:own], True)[2:]
        if dy is None:
            dy = arguments[0].new_zeros(()).expand(arguments[0].shape)
        # Where nobody differentiates again, without a Function's overhead.
        function = backward_function.apply if torch.is_grad_enabled() else backward
        found = function(dy, dfinal_state, *saved, *arguments[:own])
        gradients = [None if a is None else g for a, g in zip(arguments, found, strict=False)]
        return (*gradients, *[None] * (len(arguments) - len(gradients)))

    def forbid_second_derivative(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(
            f"{op}: its backward must be differentiated at most once; got a second derivative "
            "(create_graph=True or a nested torch.func.grad)"
        )

    backward_function = _function(f"{op}_backward", lambda *_: None, forbid_second_derivative)
    torch.library.register_autograd(f"mambablock::{op}", run_backward, setup_context=setup_context)
    return _function(op, setup_context, run_backward), backward_function


def _function(op: str, setup_context: Any, backward: Any) -> Any:
    """An autograd.Function whose forward is the operator."""
    operator = _operator(op)

    def forward(*arguments: Any) -> Any:
        return operator(*arguments)

    # torch.compile counts the parameters to see that there is no ctx.
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in argument_names(op)]
    )
    methods = {"forward": forward, "setup_context": setup_context, "backward": backward}
    return type(
        op, (torch.autograd.Function,), {name: staticmethod(f) for name, f in methods.items()}
    )


def _vmap_rule(
    op: str,
    function: Callable[..., Any],
    dims: dict[str, int],
    results: dict[str, int],
    grouped: Sequence[str],
) -> Any:
    """function's vmap rule: one call on as many times the channels."""
    names = argument_names(op)

    def rule(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Any:
        size, folded, without_groups = info.batch_size, list(arguments), set()
        for i, (name, argument, in_dim) in enumerate(zip(names, arguments, in_dims, strict=True)):
            dim = dims.get(name)
            if not isinstance(argument, Tensor) or dim is in_dim is None:
                continue
            if dim is None:
                raise RuntimeError(f"{op}: {name} must not be mapped over by vmap; got a batch")
            if in_dim is None:
                sizes = (*argument.shape[:dim], size, *argument.shape[dim:])
                moved = argument.unsqueeze(dim).expand(sizes)
            else:
                moved = argument.movedim(in_dim, dim)
            if name in grouped and moved.dim() == dim + 2:
                without_groups.add(name)  # it has one a sample now
                folded[i] = moved
            else:
                folded[i] = moved.flatten(dim, dim + 1)

        outputs, out_dims = [], []
        for output, (name, dim) in zip(function(*folded), results.items(), strict=True):
            mapped = output.dim() > dim and not (output.dim() == 1 and output.numel() == 0)
            if mapped and name not in without_groups:
                output = output.unflatten(dim, (size, output.shape[dim] // size))
            outputs.append(output)
            out_dims.append(dim if mapped else None)  # an absent one stays unmapped
        return tuple(outputs), tuple(out_dims)

    return rule
