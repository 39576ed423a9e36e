# SPDX-License-Identifier: Apache-2.0
"""Exported to ONNX and run by ONNX Runtime: the same numbers in float32."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxscript", reason="needs onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")

from mambablock import MambaBlock, MambaState, selective_scan  # noqa: E402
from mambablock.integrations.onnx import WithStates, translations  # noqa: E402

# Float32 sums of some hundred terms in another order.
assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def run(module: nn.Module, inputs: tuple[Any, ...], path: Path, dynamic: Any) -> Any:
    """The exported module as a function of tensors."""
    torch.onnx.export(
        module.eval(),
        inputs,
        path,
        dynamo=True,
        dynamic_shapes=dynamic,
        custom_translation_table=translations(),
        verbose=False,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def call(*tensors: Tensor) -> list[Tensor]:
        feed = {n: t.numpy() for n, t in zip(names, tensors, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, feed)]

    return call


class Stateful(nn.Module):
    """A block whose states are inputs and outputs."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.block = MambaBlock(12, d_state=5, **options)

    def forward(self, x: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, state = self.block(x, MambaState(conv, ssm), return_state=True)
        return y, *state


BATCH, LENGTH = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC


@pytest.mark.parametrize("options", [{}, {"d_conv": 2, "conv_bias": False, "bias": True}], ids=str)
@torch.no_grad()
def test_block_in_pieces(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Stateful(**options)
    state = module.block.allocate_state(2)
    dynamic = ({0: BATCH, 1: LENGTH}, {0: BATCH}, {0: BATCH})
    call = run(module, (torch.randn(2, 6, 12), *state), tmp_path / "block.onnx", dynamic)
    x = torch.randn(3, 13, 12)
    expected, last = module.block(x, return_state=True)
    states, outputs = list(module.block.allocate_state(3)), []
    for piece in x.split([9, 1, 1, 2], dim=1):  # prefill, two steps, and a further piece
        y, *states = call(piece, *states)
        outputs.append(y)
    assert_close(torch.cat(outputs, dim=1), expected)
    assert_close(tuple(states), tuple(last))


class Reversed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = MambaBlock(12, d_state=5)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, reverse=True)


class Grouped(nn.Module):
    def forward(self, u: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return selective_scan(u, u * 0.1, A, B, B)


@torch.no_grad()
def test_reverse_and_groups(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Reversed()
    call = run(module, (torch.randn(2, 6, 12),), tmp_path / "r.onnx", ({0: BATCH, 1: LENGTH},))
    x = torch.randn(1, 9, 12)
    assert_close(call(x)[0], module(x))

    u, A, B = torch.randn(2, 7, 6), -torch.rand(6, 4), torch.randn(2, 7, 3, 4)
    dynamic = ({0: BATCH, 1: LENGTH}, {}, {0: BATCH, 1: LENGTH})
    call = run(Grouped(), (u, A, B), tmp_path / "g.onnx", dynamic)
    assert_close(call(u, A, B)[0], Grouped()(u, A, B))


def test_packed_sequences_are_refused(tmp_path: Path) -> None:
    class Packed(MambaBlock):
        def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, cu_seqlens=cu_seqlens)

    inputs = (torch.randn(1, 6, 12), torch.tensor([0, 2, 6]))
    with pytest.raises(Exception, match="cu_seqlens must be None for ONNX"):
        run(Packed(12), inputs, tmp_path / "p.onnx", None)


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
@torch.no_grad()
def test_patched_model(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from mambablock.integrations.transformers import patch

    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    config = transformers.AutoConfig.for_model(kind, **sizes, pad_token_id=0)
    model = patch(transformers.AutoModelForCausalLM.from_config(config)).eval()
    module = WithStates(model)
    dynamic = ({0: BATCH, 1: LENGTH}, {1: BATCH}, {1: BATCH})
    inputs = (torch.randint(1, 31, (2, 6)), *module.initial_states(2))
    call = run(module, inputs, tmp_path / "model.onnx", dynamic)
    ids = torch.randint(1, 31, (3, 11))
    expected = model(ids).logits
    states, outputs = list(module.initial_states(3)), []
    for piece in ids.split([8, 1, 1, 1], dim=1):
        logits, *states = call(piece, *states)
        outputs.append(logits)
    assert_close(torch.cat(outputs, dim=1), expected)
