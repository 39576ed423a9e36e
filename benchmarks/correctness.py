# SPDX-License-Identifier: Apache-2.0
"""What must be right before anything is measured."""

from __future__ import annotations

import torch
from torch import Tensor

from mambablock import MambaBlock

from . import layout
from .implementations import (
    OURS,
    Prepare,
    conv,
    conv_inputs,
    cuda_convs,
    cuda_scans,
    decoders,
    loop_conv,
    loop_mixer,
    loop_scan,
    mixer_task,
    mixers,
    scan,
    scan_inputs,
    scans,
    under_autocast,
)
from .measure import Task
from .settings import D_MODEL, CudaSettings, Settings

# Of the largest value: a few roundings of the output's type, and of the float32 sums before it.
TOLERANCES = {
    torch.float32: 2e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
    torch.float64: 1e-12,
}


class WrongResultError(Exception):
    """An implementation does not give what the reference gives."""


def compare(name: str, got: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest error, which is at most `tolerance`, relative to the largest value expected."""
    exact = expected.to(got.device).double()
    error = float((got.double() - exact).abs().max() / exact.abs().max())
    if not error <= tolerance:  # a NaN is wrong too
        raise WrongResultError(
            f"{name} is wrong, so nothing is measured: expected an error of at most "
            f"{tolerance:.0e} of the largest value; got {error:.0e}"
        )
    return error


def check_cpu(settings: Settings) -> None:
    check_operators()
    check_layouts()
    check_implementations()


def check_cuda(settings: CudaSettings) -> None:
    """Also of the CPU's operators, which those of the device are compared with at full size."""
    check_operators()
    with torch.device(settings.device):
        check_operators()
        _check_cuda_implementations()
        _check_autocast(settings.device)


def check_operators() -> None:
    """Outputs and all gradients of the scan and the convolution, against the reference."""
    torch.manual_seed(0)
    for dtype, tolerance in TOLERANCES.items():
        # Neither size is a multiple of a tile's.
        for name, operator, loop, inputs in (
            ("selective_scan", scan, loop_scan, scan_inputs(130, d_inner=72, dtype=dtype)),
            ("causal_conv1d", conv, loop_conv, conv_inputs(130, d_inner=72, dtype=dtype)),
        ):
            exact = loop({name: tensor.double() for name, tensor in inputs.items()})
            _check_task(f"{name} ({dtype})", operator(inputs), exact, tolerance)


def check_layouts() -> None:
    """That both memory layouts give the same bits."""
    torch.manual_seed(0)
    for op, by_layout in layout.tasks(300, 136, torch.float32).items():
        expected = by_layout[layout.CHANNELS_LAST].train()
        for got, wanted in zip(by_layout[layout.CONTIGUOUS].train(), expected, strict=True):
            compare(f"the {op} of (B, D, L) memory", got, wanted, 0.0)


def check_implementations() -> None:
    """That all implementations compute the same thing, at full width."""
    torch.manual_seed(0)
    _check_others("scan", scans(), loop_scan, scan_inputs(70, dtype=torch.float32))
    block = MambaBlock(D_MODEL)
    x = torch.randn(1, 20, D_MODEL)
    with torch.no_grad():
        y = block(x)
        for name, mixer in mixers(block).items():
            compare(f"the block of {name}", mixer(x), y, TOLERANCES[torch.float32])
        for name, step in decoders(block).items():
            steps = torch.stack([step(token) for token in x.unbind(1)], 1)
            compare(f"the decode step of {name}", steps, y, TOLERANCES[torch.float32])


def _check_cuda_implementations() -> None:
    sizes = {"d_inner": 72, "dtype": torch.bfloat16, "batch": 2}
    _check_others("scan", cuda_scans(), loop_scan, scan_inputs(70, **sizes))
    _check_others("convolution", cuda_convs(), loop_conv, conv_inputs(70, **sizes))


def _check_others(
    op: str, by_name: dict[str, Prepare], loop: Prepare, inputs: dict[str, Tensor]
) -> None:
    """The forward of each, whose output is (batch, channels, length) in some."""
    expected = loop({name: tensor.float() for name, tensor in inputs.items()}).forward()[0]
    for name, prepare in by_name.items():
        y = prepare(inputs).forward()[0]
        y = y if y.shape == expected.shape else y.transpose(1, 2)
        dtype = next(iter(inputs.values())).dtype
        compare(f"the {op} of {name}", y, expected, TOLERANCES[dtype])


def _check_autocast(device: str) -> None:
    """The block in bfloat16, against itself in float32 with the reference's operators."""
    block, x = MambaBlock(64), torch.randn(2, 70, 64)
    task = under_autocast(mixer_task(block, block, x), device)
    # Some roundings to bfloat16 in sequence.
    tolerance = 3 * TOLERANCES[torch.bfloat16]
    _check_task("block under autocast", task, mixer_task(loop_mixer(block), block, x), tolerance)


def check_against_cpu(name: str, prepare: Prepare, inputs: dict[str, Tensor]) -> None:
    """Outputs and all gradients of bfloat16 inputs, against the CPU's kernels in float32."""
    exact = prepare({name: t.float().cpu() for name, t in inputs.items()})
    _check_task(name, prepare(inputs), exact, TOLERANCES[torch.bfloat16])


def _check_task(name: str, task: Task, exact: Task, tolerance: float) -> None:
    (expected,) = exact.forward()
    compare(f"{OURS}'s {name}, forward", task.forward()[0], expected, tolerance)
    exact.output_gradients = tuple(t.to(expected) for t in task.output_gradients)
    for got, wanted in zip(task.train(), exact.train(), strict=True):
        compare(f"{OURS}'s {name}, backward", got, wanted, tolerance)
