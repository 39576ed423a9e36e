# SPDX-License-Identifier: Apache-2.0
"""What the machine code of the CUDA kernels may use, checked without a GPU."""

from __future__ import annotations

import pytest
from tools.sass import EMULATION, LIBRARY
from tools.sass.account import accounts
from tools.sass.launches import Problem, record
from tools.sass.listing import Kernel, MissingToolError, find_tools, read_kernels
from tools.sass.machine import Device, blocks_per_multiprocessor


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    if not LIBRARY.exists():
        pytest.skip("needs the CUDA library, which is built where there is nvcc")
    try:
        find_tools()
    except MissingToolError as error:
        pytest.skip(str(error))
    return read_kernels(LIBRARY)


def test_no_kernel_spills(kernels: list[Kernel]) -> None:
    spilling = {f"{k.name} on sm_{k.architecture}" for k in kernels if k.spills or k.stack}
    assert not spilling


def test_kernels_are_few(kernels: list[Kernel]) -> None:
    names = {kernel.name for kernel in kernels}
    architectures = {kernel.architecture for kernel in kernels}
    assert len(names) <= 64
    assert len(kernels) == len(names) * len(architectures)


@pytest.mark.parametrize(
    ("operator", "issued", "exps"),
    [
        ("forward", 7.0, 1.1),
        ("backward", 20.0, 2.2),
        # The tiles are transposed, and B and C are loaded one by one.
        ("forward of (B, D, L) memory", 7.5, 1.1),
        ("backward of (B, D, L) memory", 21.0, 2.2),
    ],
)
def test_budgets(kernels: list[Kernel], operator: str, issued: float, exps: float) -> None:
    """Per state-step of the scan in bfloat16 on sm_90, over all kernels that it launches."""
    if not EMULATION.exists():
        pytest.skip("needs the emulated kernels, which make cuda-check builds")
    if 90 not in {kernel.architecture for kernel in kernels}:
        pytest.skip("needs kernels for sm_90; TORCH_CUDA_ARCH_LIST left it out")
    problem = Problem()
    (launches,) = record(EMULATION, [problem], Device().multiprocessors)
    found = accounts(kernels, launches[operator], 90, problem)
    assert sum(account.issued for account in found) <= issued
    assert sum(account.exps for account in found) <= exps


@pytest.mark.parametrize(
    ("operator", "least"), [("forward", 2), ("backward", 2), ("convolution", 2)]
)
def test_blocks_fit_side_by_side(kernels: list[Kernel], operator: str, least: int) -> None:
    """So that one block's schedulers have work while another's wait, on every architecture whose
    multiprocessors have the room (86, 89 and 120 have 100 KiB of shared memory)."""
    if not EMULATION.exists():
        pytest.skip("needs the emulated kernels, which make cuda-check builds")
    (launches,) = record(EMULATION, [Problem()], Device().multiprocessors)
    for kernel in kernels:
        for launch in launches[operator]:
            if kernel.name == launch.kernel and kernel.architecture not in (75, 86, 89, 120):
                fit = blocks_per_multiprocessor(kernel, launch.threads, launch.dynamic_shared)
                assert fit >= least, f"{kernel.name} on sm_{kernel.architecture}"
