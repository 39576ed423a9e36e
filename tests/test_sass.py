# SPDX-License-Identifier: Apache-2.0
"""What the machine code of the CUDA kernels may use, checked without a GPU."""

from __future__ import annotations

import pytest
from tools.sass import EMULATION, LIBRARY
from tools.sass.launches import Launch, record
from tools.sass.listing import Kernel, MissingToolError, find_kernel, find_tools, read_kernels
from tools.sass.machine import Device, blocks_per_multiprocessor
from tools.sass.simulated import CASES, simulate_launch


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    if not LIBRARY.exists():
        pytest.skip("needs the CUDA library, which is built where there is nvcc")
    try:
        find_tools()
    except MissingToolError as error:
        pytest.skip(str(error))
    return read_kernels(LIBRARY)


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, list[Launch]]]:
    """The launches of the first case's problems."""
    if not EMULATION.exists():
        pytest.skip("needs the emulated kernels, which make cuda-check builds")
    return record(EMULATION, CASES[0].problems, Device().multiprocessors)


def test_no_kernel_spills(kernels: list[Kernel]) -> None:
    spilling = {f"{k.name} on sm_{k.architecture}" for k in kernels if k.spills or k.stack}
    assert not spilling


def test_kernels_are_few(kernels: list[Kernel]) -> None:
    names = {kernel.name for kernel in kernels}
    architectures = {kernel.architecture for kernel in kernels}
    assert len(names) <= 64
    assert len(kernels) == len(names) * len(architectures)


@pytest.mark.parametrize(
    ("operator", "clocks"),
    [
        # What the simulation finds, and two clocks. An exponential for each state-step takes 128.
        ("forward", 159),
        ("forward with softplus and z", 201),
        ("backward", 479),
        ("backward with softplus and z", 558),
    ],
)
def test_clocks(
    kernels: list[Kernel],
    recorded: list[dict[str, list[Launch]]],
    operator: str,
    clocks: float,
) -> None:
    """Of a scheduler for 512 state-steps of the scan in bfloat16 on sm_90, over whole tiles."""
    built = [kernel for kernel in kernels if kernel.architecture == 90]
    if not built:
        pytest.skip("needs kernels for sm_90; TORCH_CUDA_ARCH_LIST left it out")
    launches = [launched[operator][0] for launched in recorded]
    kernel = find_kernel(built, launches[0].kernel)
    assert simulate_launch(kernel, launches, CASES[0], Device(), by_warps=()).clocks <= clocks


@pytest.mark.parametrize(
    ("operator", "least"), [("forward", 2), ("backward", 2), ("convolution", 2)]
)
def test_blocks_fit_side_by_side(
    kernels: list[Kernel], recorded: list[dict[str, list[Launch]]], operator: str, least: int
) -> None:
    """So that one block's schedulers have work while another's wait, on every architecture whose
    multiprocessors have the room (86, 89 and 120 have 100 KiB of shared memory)."""
    for kernel in kernels:
        for launch in recorded[-1][operator]:
            if kernel.name == launch.kernel and kernel.architecture not in (75, 86, 89, 120):
                fit = blocks_per_multiprocessor(kernel, launch.threads, launch.dynamic_shared)
                assert fit >= least, f"{kernel.name} on sm_{kernel.architecture}"
