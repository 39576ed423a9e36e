# SPDX-License-Identifier: Apache-2.0
"""What the tests of several operators share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import hypothesis
import pytest
import torch
from torch import Tensor

from mambablock._library import TIME_TILE  # the emulated kernels must come after the CPU's

LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)

# The library of the emulated CUDA kernels, which take the place of the CPU's; see make cuda-check.
EMULATION = os.environ.get("MAMBABLOCK_EMULATION")
if EMULATION:
    torch.ops.load_library(EMULATION)
    TIME_TILE["cpu"] = TIME_TILE["cuda"]

# Set by make gpu-check, where a device that goes missing is no reason to skip.
REQUIRE_CUDA = "MAMBABLOCK_REQUIRE_CUDA" in os.environ

hypothesis.settings.register_profile("mambablock", max_examples=60, deadline=None)
hypothesis.settings.load_profile("mambablock")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where tensors are made that name no device; with emulated kernels, for "cuda" too the CPU."""
    cuda = request.param == "cuda"
    if cuda and (marker := request.node.get_closest_marker("cpu_kernels")):
        pytest.skip(marker.args[0])
    if EMULATION and not cuda:
        pytest.skip("the emulated CUDA kernels have taken the CPU kernels' place")
    if cuda and not EMULATION:
        if not torch.cuda.is_available():
            if REQUIRE_CUDA:
                pytest.fail("needs a CUDA device")
            pytest.skip("needs a CUDA device")
        with torch.device("cuda"):
            yield torch.device("cuda", torch.cuda.current_device())
    else:
        yield torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
