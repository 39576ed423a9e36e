# SPDX-License-Identifier: Apache-2.0
"""What must be right before anything is measured."""

from __future__ import annotations

import torch
from torch import Tensor

from mambablock import MambaBlock, reference

from . import layout
from .contenders import OURS, conv, decoders, loop_scan, mixers, scan, scan_inputs, scans, tiled
from .measure import Task
from .settings import D_CONV, D_MODEL

# Of the largest value: a few roundings of the output's type, and of the float32 sums before it.
TOLERANCES = {
    torch.float32: 2e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
    torch.float64: 1e-12,
}


class WrongResultError(Exception):
    """An implementation does not give what the reference gives."""


def compare(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    if not error <= tolerance:  # a NaN is wrong too
        raise WrongResultError(
            f"{name} is wrong, so nothing is measured: expected an error of at most "
            f"{tolerance:.0e} of the largest value; got {error:.0e}"
        )


def check_operators() -> None:
    """Outputs and all gradients of the scan and the convolution, against the reference."""
    torch.manual_seed(0)
    for dtype in TOLERANCES:
        # Neither the time nor the channels are whole tiles.
        inputs = scan_inputs(130, d_inner=72, dtype=dtype)
        exact = {name: tensor.double() for name, tensor in inputs.items()}
        _check_task("selective_scan", scan(inputs), loop_scan(exact), dtype)

        x, wide = tiled(130, 72, dtype), inputs["D"].dtype
        tensors = (x, torch.randn(72, D_CONV, dtype=wide), torch.randn(72, dtype=wide))
        exact_conv = Task(_loop_conv, *(t.double() for t in tensors))
        _check_task("causal_conv1d", Task(conv, *tensors), exact_conv, dtype)


def check_layouts() -> None:
    """That both memory layouts give the same."""
    torch.manual_seed(0)
    for op, by_layout in layout.tasks(70, 72, torch.float32).items():
        expected = by_layout[layout.CHANNELS_LAST].train()
        for got, wanted in zip(by_layout[layout.CONTIGUOUS].train(), expected, strict=True):
            compare(f"the {op} of (B, D, L) memory", got, wanted, 0.0)


def check_contenders() -> None:
    """That all implementations compute the same thing, at full width."""
    torch.manual_seed(0)
    inputs = scan_inputs(70, dtype=torch.float32)
    expected = loop_scan(inputs).forward()[0]
    for name, prepare in scans().items():
        y = prepare(inputs).forward()[0]
        y = y if y.shape == expected.shape else y.transpose(1, 2)
        compare(f"the scan of {name}", y, expected, TOLERANCES[torch.float32])
    block = MambaBlock(D_MODEL)
    x = torch.randn(1, 20, D_MODEL)
    with torch.no_grad():
        y = block(x)
        for name, mixer in mixers(block).items():
            compare(f"the block of {name}", mixer(x), y, TOLERANCES[torch.float32])
        for name, step in decoders(block).items():
            steps = torch.stack([step(token) for token in x.unbind(1)], 1)
            compare(f"the decode step of {name}", steps, y, TOLERANCES[torch.float32])


def _loop_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = reference.causal_conv1d(x, weight, bias=bias, silu=True)
    assert isinstance(y, Tensor)
    return y


def _check_task(name: str, task: Task, exact: Task, dtype: torch.dtype) -> None:
    title = f"{OURS}'s {name} ({dtype})"
    compare(f"{title}, forward", task.forward()[0], exact.forward()[0], TOLERANCES[dtype])
    exact.output_gradients = tuple(t.double() for t in task.output_gradients)
    for got, expected in zip(task.train(), exact.train(), strict=True):
        compare(f"{title}, backward", got, expected, TOLERANCES[dtype])
