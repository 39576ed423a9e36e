# SPDX-License-Identifier: Apache-2.0
"""What an installed mambablock must do without a compiler or the source tree.

    python smoke.py [EXAMPLE.py]

runs the example too, and prints as JSON what it ran on. It needs torch and mambablock alone.
"""

from __future__ import annotations

import json
import platform
import runpy
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

import mambablock
from mambablock import MambaBlock, reference


def close(name: str, got: Any, expected: Any) -> None:
    # Sums of some hundred float32 products of numbers around 1, against float64.
    torch.testing.assert_close(
        got, expected, rtol=1e-4, atol=1e-4, check_dtype=False, msg=lambda text: f"{name}: {text}"
    )


def call(function: Callable[..., Any], tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Results, and the gradients of all arguments that ask for them."""
    result = function(**tensors, **options)
    results = list(result) if isinstance(result, tuple) else [result]
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    if leaves:
        results += torch.autograd.grad(sum(y.square().sum() for y in results), leaves)
    return results


def compare(op: str, tensors: dict[str, Tensor], **options: Any) -> None:
    def copies(dtype: torch.dtype) -> dict[str, Tensor]:
        train = not op.endswith("_update")
        return {n: t.detach().to(dtype).requires_grad_(train) for n, t in tensors.items()}

    ours, exact = copies(torch.float32), copies(torch.float64)
    close(
        op,
        call(getattr(mambablock, op), ours, **options),
        call(getattr(reference, op), exact, **options),
    )
    if "state" in tensors:
        close(f"{op}: state", ours["state"], exact["state"])


def operators() -> None:
    batch, length, d_inner, d_state, width = 2, 70, 37, 16, 4
    rows = (batch, length, d_inner)
    conv = {"weight": torch.randn(d_inner, width), "bias": torch.randn(d_inner)}
    compare("causal_conv1d", {"x": torch.randn(rows), **conv}, silu=True, return_final_state=True)
    compare(
        "causal_conv1d_update",
        {"state": torch.randn(batch, width - 1, d_inner), "x": torch.randn(batch, d_inner), **conv},
        silu=True,
    )
    scan = {"A": -torch.rand(d_inner, d_state) - 0.1}
    of_channels = {"D": torch.randn(d_inner), "delta_bias": torch.randn(d_inner)}
    for shape, op, state in (
        ((batch, length), "selective_scan", "initial_state"),
        ((batch,), "selective_state_update", "state"),
    ):
        tensors = {name: torch.randn(*shape, d_inner) for name in ("u", "delta", "z")}
        tensors |= {name: torch.randn(*shape, d_state) for name in ("B", "C")}
        tensors |= scan | of_channels | {state: torch.randn(batch, d_inner, d_state)}
        whole = {} if state == "state" else {"return_final_state": True}
        compare(op, tensors, delta_softplus=True, **whole)


def block() -> None:
    block = MambaBlock(d_model=32)
    x = torch.randn(2, 20, 32)
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = (block(x) - x.roll(-1, dims=1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses

    expected = block(x).detach()
    with torch.inference_mode():
        state = block.allocate_state(batch=2)
        close("step", torch.stack([block.step(x[:, t], state) for t in range(20)], 1), expected)
    # Inductor would want a compiler; what it is given is the same graph.
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    close("torch.compile", compiled(x), expected)
    compiled(x).sum().backward()


def libraries() -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has("mambablock::selective_scan", "CPU")
    assert has("mambablock::selective_scan", "CUDA") == (torch.version.cuda is not None)


def main() -> None:
    found = [tool for tool in ("cc", "c++", "gcc", "g++", "clang", "nvcc") if shutil.which(tool)]
    assert not found, f"expected no compiler in PATH; got {found}"
    torch.manual_seed(0)
    operators()
    block()
    libraries()
    if len(sys.argv) > 1:
        runpy.run_path(sys.argv[1])
    info = mambablock.build_info()
    assert info["version"] == metadata.version("mambablock")
    print(
        json.dumps(
            {
                "machine": platform.machine(),
                "glibc": platform.libc_ver()[1],
                "python": platform.python_version(),
                "torch": torch.__version__,
                "simd_level": info["simd_level"],
                "cuda": torch.version.cuda,
                "package": mambablock.__file__,
            }
        )
    )


if __name__ == "__main__":
    main()
