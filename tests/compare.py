# SPDX-License-Identifier: Apache-2.0
"""What is compared, and how nearly it must agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients(
    function: Callable[..., tuple[Tensor, ...]], tensors: dict[str, Tensor | None]
) -> dict[str, Tensor]:
    """The outputs of `function(**tensors)` and, of a fixed weighting of them, all gradients."""
    leaves = {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in tensors.items()
        if tensor is not None
    }
    outputs = function(**{**tensors, **leaves})
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weights = torch.linspace(-1, 1.3, max(output.numel(), 1), dtype=torch.float64)
        loss = loss + (output.double() * weights[: output.numel()].view(output.shape)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    result = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
        result["d" + name] = torch.zeros_like(leaf) if gradient is None else gradient
    return result


def assert_float64_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, oracle in expected.items():
        # Sums of some hundred float64 terms in another order.
        torch.testing.assert_close(
            got[name], oracle, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_as_exact_as_pytorch(
    got: dict[str, Tensor], same_precision: dict[str, Tensor], oracle: dict[str, Tensor]
) -> None:
    """Max and RMS error against float64 are at most twice those of PyTorch in that precision."""
    for name, exact in oracle.items():
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


def boundaries(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0).to(dtype)


def rows_of(lengths: Sequence[int]) -> tuple[int, int | None, Tensor | None]:
    """Two rows of one length, or one of packed sequences: the batch, the states, cu_seqlens."""
    return (2, None, None) if len(lengths) == 1 else (1, len(lengths), boundaries(lengths))
