# SPDX-License-Identifier: Apache-2.0
"""examples/cpp: packages compiled ahead of time, run from Python and from the C++ program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mambablock import MambaBlock

EXAMPLE = Path(__file__).parents[1] / "examples" / "cpp"


class Packages(NamedTuple):
    folder: Path
    library: str
    printed: str


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    folder = tmp_path_factory.mktemp("packages")
    command = [sys.executable, str(EXAMPLE / "export.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Packages(folder, done.stderr.splitlines()[-1], done.stdout)


@torch.no_grad()
@pytest.mark.parametrize(("batch", "length"), [(2, 70), (1, 1), (3, 129)])
def test_packages_from_python(packages: Packages, batch: int, length: int) -> None:
    prefill, decode = (
        torch._inductor.aoti_load_package(str(packages.folder / f"{name}.pt2"))
        for name in ("prefill", "decode")
    )
    torch.manual_seed(0)
    block = MambaBlock(16)
    x = torch.randn(batch, length + 3, 16)
    y, *state = prefill(x[:, :length].contiguous(), *block.allocate_state(batch))
    steps = [decode(x[:, length + t].contiguous(), *state) for t in range(3)]
    got = torch.cat([y, torch.stack(steps, dim=1)], dim=1)
    # float32 sums of some dozen terms in another order.
    torch.testing.assert_close(got, block(x), rtol=1e-5, atol=1e-6)


def test_cpp_program_prints_what_python_prints(packages: Packages, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        pytest.skip("needs cmake")

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    build = str(tmp_path)
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    run(cmake, "-S", str(EXAMPLE), "-B", build, prefix)
    run(cmake, "--build", build)
    printed = run(f"{build}/generate", str(packages.folder), packages.library)
    got, expected = (
        torch.tensor([[float(value) for value in line.split()] for line in text.splitlines()])
        for text in (printed, packages.printed)
    )
    assert got.shape == (6, 32)
    # Six decimals are printed, and sums are as above.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)
