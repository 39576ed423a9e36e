# SPDX-License-Identifier: Apache-2.0
"""What the tests compare, and how closely it must agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from operators import Operator, Tensors, as_dtype

assert_same_bits = partial(torch.testing.assert_close, rtol=0, atol=0)


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a sum of the outputs with fixed random weights; zeros for an unused input."""
    generator = torch.Generator("cpu").manual_seed(1)
    weighted = [
        (o, torch.randn(o.shape, generator=generator, dtype=torch.float64, device="cpu").to(o))
        for o in outputs
    ]
    outputs, weights = zip(*((o, w) for o, w in weighted if o.requires_grad), strict=True)
    return torch.autograd.grad(outputs, inputs, weights, materialize_grads=True)


def results(function: Callable[..., Any], tensors: Tensors, **options: Any) -> dict[str, Tensor]:
    """The outputs of function(**tensors, **options) and their gradients; of an update, y and the
    state that it leaves.
    """
    if "state" in tensors:
        state = tensors["state"].clone()
        return {"y": function(**(tensors | {"state": state}), **options), "state": state}
    leaves = {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in tensors.items()
        if tensor is not None and tensor.is_floating_point()
    }
    outputs = function(**(tensors | leaves), **options)
    found = gradients(outputs, list(leaves.values()))
    named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return named | {"d" + name: g for name, g in zip(leaves, found, strict=True)}


def assert_float64_equal(
    got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10
) -> None:
    for name, value in expected.items():
        # Sums of some hundred float64 terms in another order; lower types may round to the
        # neighbour.
        allowed = max(tolerance, 10 * torch.finfo(value.dtype).eps)
        torch.testing.assert_close(
            got[name], value, rtol=allowed, atol=allowed, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_matches_reference(op: Operator, tensors: Tensors, **options: Any) -> None:
    """In float64; an update in any type."""
    tolerance = 1e-10
    if op.is_update:
        # Sums of some dozen terms, in the accumulator's type whatever the state's.
        tolerance = 1e-12 if tensors[op.activations[0]].dtype == torch.float64 else 1e-5
    got, expected = (results(f, tensors, **options) for f in (op, op.reference))
    assert_float64_equal(got, expected, tolerance)


def assert_as_exact_as_pytorch(op: Operator, tensors: Tensors) -> None:
    """Max and RMS error against float64 are at most twice those of PyTorch in that precision."""
    got, same_precision = results(op, tensors), results(op.reference, tensors)
    for name, exact in results(op.reference, as_dtype(tensors, torch.float64)).items():
        if exact.numel() == 0:
            continue
        scale = exact.abs().max().item()
        mine = (got[name].double() - exact).abs()
        theirs = (same_precision[name].double() - exact).abs()
        # A few roundings of the largest value: PyTorch may by luck be exact on few elements.
        slack = 8 * torch.finfo(torch.float32).eps * scale + 1e-7
        if got[name].dtype in (torch.bfloat16, torch.float16):
            slack += torch.finfo(got[name].dtype).eps * scale
        assert mine.max() <= 2 * theirs.max() + slack, name
        assert mine.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt() + slack, name


def time_last(tensor: Tensor) -> Tensor:
    """The same (B, L, D) in memory of (B, D, L)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def reversed_strides(tensor: Tensor) -> Tensor:
    """The same tensor, its first dimension fastest in memory."""
    order = list(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def boundaries(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0).to(dtype)


def packing(lengths: Sequence[int] | None) -> tuple[int | None, Tensor | None]:
    """The number of states, and cu_seqlens; None for both where sequences are not packed."""
    return (None, None) if lengths is None else (len(lengths), boundaries(lengths))
