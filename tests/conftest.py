# SPDX-License-Identifier: Apache-2.0
"""Set-up and fixtures: the device of a test, emulated CUDA kernels, Hypothesis, the seed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from mambablock._library import SAVED_STATES  # the emulated kernels must come after the CPU's

# The library of the emulated CUDA kernels, which take the place of the CPU's; see make cuda-check.
EMULATION = os.environ.get("MAMBABLOCK_EMULATION")
if EMULATION:
    torch.ops.load_library(EMULATION)
    SAVED_STATES["cpu"] = SAVED_STATES["cuda"]

# Set by make gpu-check, where a missing device is a failure.
REQUIRE_CUDA = "MAMBABLOCK_REQUIRE_CUDA" in os.environ

hypothesis.settings.register_profile("mambablock", max_examples=60, deadline=None)
hypothesis.settings.load_profile("mambablock")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The default device of new tensors; with emulated kernels, the CPU for "cuda" too."""
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


@pytest.fixture
def emulated() -> None:
    """For tests that set properties of the device, which only the emulation allows."""
    if not EMULATION:
        pytest.skip("no kernel is emulated")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
