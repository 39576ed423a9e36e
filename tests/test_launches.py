# SPDX-License-Identifier: Apache-2.0
"""How many launches a bfloat16 block takes on CUDA, counted without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mambablock import MambaBlock

# Of each operator, at sizes that need no chunks of time; test_launches_of_operators counts them.
LAUNCHES = {
    "mambablock::causal_conv1d": 1,
    "mambablock::causal_conv1d_backward": 2,  # the second sums
    "mambablock::selective_scan": 1,
    "mambablock::selective_scan_backward": 2,
    "mambablock::causal_conv1d_update": 1,
    "mambablock::selective_state_update": 1,
}
ALLOCATIONS = ("aten::empty", "aten::new_empty")


class Launches(TorchDispatchMode):
    """Records the calls that launch something: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        # Autograd sees to it that a product's new memory is viewed like this.
        if not (func.is_view or name == "aten::_unsafe_view" or name.startswith(ALLOCATIONS)):
            self.calls.append(name)
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def count(self) -> int:
        """A matrix product is one launch, and so is every other call of PyTorch's."""
        return sum(LAUNCHES.get(name, 1) for name in self.calls)


def training_step(block: MambaBlock, hidden: Tensor, mode: Launches) -> tuple[int, int]:
    """The launches of forward and backward, the latter into gradients that are not there yet."""
    with mode:
        y = block(hidden)
        forward = mode.count()
        y.backward(torch.empty_like(y))
    return forward, mode.count() - forward


def bfloat16_block(device: str) -> tuple[MambaBlock, Tensor]:
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    return MambaBlock(64, **options), torch.zeros(8, 64, 64, **options)


# Meta tensors dispatch as CUDA's do; fake tensors on CUDA need a torch with CUDA.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_step(dtype: torch.dtype) -> None:
    """dtype: of A_log and D, which a block keeps in float32 unless it is cast as a whole."""
    block, hidden = bfloat16_block("meta")
    block.A_log.data, block.D.data = block.A_log.data.to(dtype), block.D.data.to(dtype)
    mode = Launches()
    forward, backward = training_step(block, hidden.requires_grad_(), mode)
    assert forward == 6, mode.calls
    assert backward == 14, mode.calls


def test_decoding_step() -> None:
    block, hidden = bfloat16_block("meta")
    state = block.allocate_state(8)
    with Launches() as mode:
        block.step(hidden[:, 0], state)
    assert mode.count() == 6, mode.calls


class Recorded(Launches):
    """Counts what our operators launch: the kernels they ask for, and copies that PyTorch makes."""

    def __init__(self, record: Path) -> None:
        super().__init__()
        self.record = record
        self.found: dict[str, int] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.name() not in LAUNCHES:
            return super().run(func, args, kwargs)
        self.record.write_text("")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            output = super().run(func, args, kwargs)
        copies = [event for event in profile.events() if event.name == "aten::copy_"]
        self.found[func.name()] = len(self.record.read_text().splitlines()) + len(copies)
        return output


@pytest.mark.usefixtures("emulated", "device")
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_launches_of_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mode = Recorded(tmp_path / "launches")
    monkeypatch.setenv("MAMBABLOCK_EMULATION_RECORD", str(mode.record))  # it runs no kernel
    monkeypatch.setenv("MAMBABLOCK_EMULATION_MULTIPROCESSORS", "1")  # no chunks of time
    block, hidden = bfloat16_block("cpu")
    training_step(block, hidden.requires_grad_(), mode)
    block.out_proj.register_forward_hook(lambda *_: None)  # so that step calls the operators
    with mode:
        block.step(hidden[:, 0], block.allocate_state(8))
    assert mode.found == LAUNCHES
