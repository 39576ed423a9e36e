# SPDX-License-Identifier: Apache-2.0
"""What MambaBlock refuses, and what it says."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blocks import Adapted, make_block
from mambablock import MambaBlock, MambaState

pytestmark = pytest.mark.usefixtures("device")


BAD_VALUES: list[tuple[str, object]] = [
    ("d_model", 0),
    ("d_model", -4),
    ("d_state", 0),
    ("d_conv", 0),
    ("expand", 0),
    ("expand", -1.0),
    ("expand", math.inf),
    ("dt_rank", 0),
    ("dt_rank", "full"),
    ("d_inner", 0),
    ("d_inner", -8),
    ("dt_min", 0.0),
    ("dt_max", -0.1),
    ("dt_max", 1e-4),
    ("dt_max", math.inf),
    ("dt_init_floor", 0.0),
    ("dt_init_floor", math.inf),
    ("dt_scale", -1.0),
    ("dt_init", "zeros"),
    ("dtype", torch.int32),
    ("dtype", torch.complex64),
    *((name, math.nan) for name in ("expand", "dt_min", "dt_max", "dt_scale", "dt_init_floor")),
]


@pytest.mark.parametrize(("argument", "value"), BAD_VALUES)
def test_bad_constructor_argument(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^MambaBlock: {argument} .*{value}"):
        MambaBlock(**({"d_model": 8} | {argument: value}))


BAD_TYPES: list[tuple[str, object]] = [
    *itertools.product(["d_model", "d_state", "d_conv"], ["8", 8.0, True, None]),
    *itertools.product(["d_inner", "layer_idx"], ["8", 8.0, True]),
    *itertools.product(["dt_rank"], [None, 2.5, 2.0, True]),
    *itertools.product(["expand", "dt_min", "dt_max", "dt_scale"], ["1", True, None, [2]]),
    *itertools.product(["dt_init_floor"], ["1", True, None]),
    *itertools.product(["conv_bias", "bias", "recompute"], ["no", 0, None]),
    ("dtype", "float32"),
    ("dtype", float),
]


@pytest.mark.parametrize(("argument", "value"), BAD_TYPES)
def test_constructor_argument_of_a_wrong_type(argument: str, value: object) -> None:
    got = type(value).__name__ if isinstance(value, (list, type)) else re.escape(repr(value))
    with pytest.raises(TypeError, match=rf"^MambaBlock: {argument} must be .*; got {got}"):
        MambaBlock(**({"d_model": 8} | {argument: value}))


def test_integers_of_numpy_are_sizes() -> None:
    block = MambaBlock(np.int64(8), d_state=np.int32(3), expand=np.float32(2))
    assert block.A_log.shape == (16, 3)
    assert block.allocate_state(np.int64(2)).ssm.shape == (2, 16, 3)


def test_subclasses_are_named() -> None:
    class Encoder(MambaBlock):
        pass

    with pytest.raises(ValueError, match=r"^Encoder: d_model must be positive; got 0"):
        Encoder(0)
    with pytest.raises(TypeError, match=r"^Encoder: hidden_states must be a Tensor; got None"):
        Encoder(8)(None)


@pytest.mark.parametrize("name", [3, None, True, b"encoder"])
def test_name_that_is_no_text(name: object) -> None:
    block = MambaBlock(8)
    with pytest.raises(TypeError, match=r"^MambaBlock: name must be a str; got "):
        block.name = name
    assert block.name == "mamba_block"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1,), ValueError, "batch must not be negative; got -1"),
        ((2.5,), TypeError, "batch must be an integer; got 2.5"),
        (("2",), TypeError, "batch must be an integer; got '2'"),
        ((None,), TypeError, "batch must be an integer; got None"),
        ((True,), TypeError, "batch must be an integer; got True"),
        ((2, None, torch.int32), ValueError, "dtype must be torch.float32, .*; got torch.int32"),
        ((2, None, "float32"), TypeError, "dtype must be torch.float32, .*; got 'float32'"),
    ],
)
def test_bad_allocate_state(
    arguments: tuple[object, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^MambaBlock: {message}"):
        MambaBlock(8).allocate_state(*arguments)


def test_expand_too_small_for_one_channel() -> None:
    with pytest.raises(ValueError, match="d_inner must be positive"):
        MambaBlock(4, expand=0.1)


def bad_state(block: MambaBlock, **replaced: Tensor) -> MambaState:
    return block.allocate_state(2)._replace(**replaced)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b(torch.zeros(2, 8)), r"hidden_states must be .*d_model=8\); got \(2, 8\)"),
        (lambda b: b(torch.zeros(2, 3, 7)), r"hidden_states must be .*; got \(2, 3, 7\)"),
        (
            lambda b: b(torch.zeros(2, 3, 8), bad_state(b, conv=torch.zeros(2, 4, 16))),
            r"state.conv must be \(batch=2, inputs=3, d_inner=16\); got \(2, 4, 16\)",
        ),
        (
            lambda b: b(torch.zeros(2, 3, 8), bad_state(b, ssm=torch.zeros(2, 16, 4))),
            r"state.ssm must be \(batch=2, d_inner=16, d_state=16\); got \(2, 16, 4\)",
        ),
        (lambda b: b(torch.zeros(3, 3, 8), b.allocate_state(2)), r"state.conv must be \(batch=3"),
        (
            lambda b: b(
                torch.zeros(1, 5, 8), b.allocate_state(2), cu_seqlens=torch.tensor([0, 1, 3, 5])
            ),
            r"state.conv must be \(batch=3",
        ),
        (
            lambda b: b(torch.zeros(2, 3, 8), attention_mask=torch.ones(2, 4, dtype=torch.bool)),
            r"attention_mask must be \(batch=2, length=3\); got \(2, 4\)",
        ),
        (
            lambda b: b(torch.zeros(2, 3, 8), attention_mask=torch.ones(2, 3)),
            "attention_mask must be bool or integer; got torch.float32",
        ),
        (
            lambda b: b(
                torch.zeros(1, 3, 8),
                attention_mask=torch.ones(1, 3, dtype=torch.bool),
                cu_seqlens=torch.tensor([0, 3]),
            ),
            "attention_mask and cu_seqlens",
        ),
        (
            lambda b: b.step(torch.zeros(2, 1, 8), b.allocate_state(2)),
            r"hidden_states must be \(batch, d_model=8\); got \(2, 1, 8\)",
        ),
        (lambda b: b.step(torch.zeros(2, 7), b.allocate_state(2)), r"got \(2, 7\)"),
        (lambda b: b.step(torch.zeros(3, 8), b.allocate_state(2)), r"state.conv must be \(batch=3"),
        (
            lambda b: b.step(torch.zeros(2, 8), bad_state(b, ssm=torch.zeros(2, 16))),
            r"state.ssm must be .*; got \(2, 16\)",
        ),
        (
            lambda b: b(
                torch.zeros(2, 3, 8), attention_mask=torch.ones(2, 3, device="meta").bool()
            ),
            r"attention_mask must be on (cpu|cuda:0) as hidden_states; got meta",
        ),
        (
            lambda b: b(torch.zeros(2, 3, 8), attention_mask=torch.ones(2, 3) + 0j),
            "attention_mask must be bool or integer; got torch.complex64",
        ),
        (
            lambda b: b(torch.zeros(1, 3, 8), cu_seqlens=torch.tensor([[0, 3]])),
            r"cu_seqlens must be \(sequences \+ 1\); got \(1, 2\)",
        ),
        (
            lambda b: b(torch.zeros(1, 3, 8), b.allocate_state(1), cu_seqlens=torch.tensor(3)),
            r"cu_seqlens must be \(sequences \+ 1\); got \(\)",
        ),
        (
            lambda b: b(torch.zeros(1, 0, 8), b.allocate_state(0), cu_seqlens=torch.tensor([])),
            r"cu_seqlens must be of at least one value; got \(0,\)",
        ),
    ],
)
def test_bad_call(call: Callable[[MambaBlock], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^MambaBlock: .*{message}"):
        call(MambaBlock(8))


def test_bad_step_leaves_the_state_alone() -> None:
    block = MambaBlock(8)
    state = bad_state(block, conv=torch.ones(2, 3, 16), ssm=torch.zeros(2, 16, 4))
    with pytest.raises(ValueError, match=r"state\.ssm"):
        block.step(torch.zeros(2, 8), state)
    assert torch.equal(state.conv, torch.ones(2, 3, 16))


def run(block: MambaBlock, step: bool, hidden_states: Any, state: Any) -> object:
    """forward with three steps of (2, 8), or step with one."""
    if step:
        return block.step(hidden_states, state)
    whole = isinstance(hidden_states, Tensor)
    return block(hidden_states[:, None].expand(-1, 3, -1) if whole else hidden_states, state)


def untouched(state: Any) -> list[Tensor]:
    """Copies of the tensors in a state, to see that nothing has changed them."""
    tensors = state if isinstance(state, (tuple, list)) else [state]
    return [t.clone() for t in tensors if isinstance(t, Tensor)]


@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: None, TypeError, "a Tensor; got None"),
        (lambda x: x.tolist(), TypeError, "a Tensor; got list"),
        (lambda x: x.cpu().numpy(), TypeError, "a Tensor; got ndarray"),
        (lambda x: x.long(), ValueError, "torch.float32 as the parameters; got torch.int64"),
        (lambda x: x.bool(), ValueError, "torch.float32 as the parameters; got torch.bool"),
        (lambda x: x + 0j, ValueError, "torch.float32 as the parameters; got torch.complex64"),
        (lambda x: x.double(), ValueError, "torch.float32 as the parameters; got torch.float64"),
        (lambda x: x.half(), ValueError, "torch.float32 as the parameters; got torch.float16"),
        (lambda x: x.to("meta"), ValueError, "on (cpu|cuda:0) as the parameters; got meta"),
    ],
)
def test_bad_hidden_states(
    step: bool, change: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    block = MambaBlock(8)
    state = block.allocate_state(2)
    with pytest.raises(error, match=rf"^MambaBlock: (step's )?hidden_states must be {message}"):
        run(block, step, change(torch.randn(2, 8)), state)
    assert not any(tensor.any() for tensor in state)


@pytest.mark.parametrize("step", [False, True])
def test_block_on_meta_and_hidden_states_elsewhere(step: bool) -> None:
    block = MambaBlock(8, device="meta")
    with pytest.raises(ValueError, match="hidden_states must be on meta as the parameters; got "):
        run(block, step, torch.zeros(2, 8), block.allocate_state(2))


@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.conv, TypeError, "state must be a MambaState (conv, ssm); got Tensor"),
        (lambda s: s.ssm[:, 0], TypeError, "state must be a MambaState (conv, ssm); got Tensor"),
        (lambda s: (s.conv,), TypeError, "state must be a MambaState (conv, ssm); got tuple of 1"),
        (lambda s: [*s, s.ssm], TypeError, "state must be a MambaState (conv, ssm); got list of 3"),
        (lambda s: "ab", TypeError, "state must be a MambaState (conv, ssm); got 'ab'"),
        (lambda s: s._asdict(), TypeError, "state must be a MambaState (conv, ssm); got dict"),
        (lambda s: (s.conv, None), TypeError, "state.ssm must be a Tensor; got None"),
        (lambda s: ([0.0], s.ssm), TypeError, "state.conv must be a Tensor; got list of 1"),
        (lambda s: (s.ssm, s.conv), ValueError, "state.conv must be (batch=2, inputs=3, d_inner="),
        (lambda s: (s.conv, s.ssm[:1]), ValueError, "state.ssm must be (batch=2, d_inner=16, d_"),
        *(
            (
                partial(lambda i, t, s: (*s[:i], s[i].to(t), *s[i + 1 :]), i, t),
                ValueError,
                f"state.{name} must be torch.float32 for hidden_states of torch.float32; got {t}",
            )
            for i, name in enumerate(MambaState._fields)
            for t in (torch.int64, torch.bfloat16, torch.float64)
        ),
        (lambda s: (s.conv.to("meta"), s.ssm), ValueError, "state.conv must be on "),
        (lambda s: (s.conv, s.ssm.to("meta")), ValueError, "state.ssm must be on "),
    ],
)
def test_bad_state(
    step: bool, change: Callable[[MambaState], Any], error: type[Exception], message: str
) -> None:
    block = MambaBlock(8)
    state = change(MambaState(*(torch.randn_like(t) for t in block.allocate_state(2))))
    before = untouched(state)
    with pytest.raises(error, match=f"^MambaBlock: (step's )?{re.escape(message)}"):
        run(block, step, torch.randn(2, 8), state)
    for old, new in zip(before, untouched(state), strict=True):
        assert old.is_meta or torch.equal(old, new)


def test_step_needs_a_state() -> None:
    with pytest.raises(TypeError, match=r"^MambaBlock: step's state must be a Mamba.*; got None"):
        MambaBlock(8).step(torch.zeros(2, 8), state=None)


@pytest.mark.parametrize("mask", ["left", [[1, 1, 1]] * 2, np.ones((2, 3)), True])
def test_attention_mask_that_is_no_tensor(mask: object) -> None:
    with pytest.raises(TypeError, match=r"^MambaBlock: attention_mask must be a Tensor; got "):
        MambaBlock(8)(torch.zeros(2, 3, 8), attention_mask=mask)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("cu_seqlens", ["0 3", [0, 3], (0, 3), np.array([0, 3])])
def test_cu_seqlens_that_is_no_tensor(cu_seqlens: object, with_state: bool) -> None:
    block = MambaBlock(8)
    state = block.allocate_state(1) if with_state else None
    with pytest.raises(TypeError, match=r"^MambaBlock: cu_seqlens must be a Tensor; got "):
        block(torch.zeros(1, 3, 8), state, cu_seqlens=cu_seqlens)


# What is not refused


@pytest.mark.parametrize("kind", [tuple, list])
def test_state_may_be_any_pair(kind: Callable[[MambaState], Any]) -> None:
    block = make_block()
    state, hidden = block.allocate_state(2), torch.randn(2, 6, dtype=torch.float64)
    pair = kind(block.allocate_state(2))
    assert torch.equal(block(hidden[:, None], pair), block(hidden[:, None], state))
    assert torch.equal(block.step(hidden, pair), block.step(hidden, state))
    assert torch.equal(pair[1], state.ssm)


@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_may_convert(
    device: torch.device, dtype: torch.dtype, given: torch.dtype, step: bool
) -> None:
    block = MambaBlock(8, dtype=dtype)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = run(block, step, torch.randn(2, 8, dtype=given), block.allocate_state(2))
        assert y.dtype is torch.bfloat16
        for bad in (torch.int64, torch.float64):
            with pytest.raises(ValueError, match=f"hidden_states must be {dtype} as .*; got {bad}"):
                run(block, step, torch.zeros(2, 8, dtype=bad), block.allocate_state(2))


class Converted(nn.Module):
    """A layer that takes what its weight is not, as quantised layers do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("kind", ["layer", "hook", "adapter"])
def test_layers_may_convert(kind: str, step: bool) -> None:
    block = MambaBlock(8)
    hidden = torch.randn(2, 8)
    if kind == "layer":
        block.in_proj = Converted(block.in_proj)
    elif kind == "adapter":
        block.in_proj = Adapted(block.in_proj)
    else:
        block.in_proj.register_forward_pre_hook(lambda layer, args: (args[0].float(),))
        hidden = hidden.half()
    y = run(block, step, hidden, block.allocate_state(2))
    assert y.dtype is torch.float32
    with pytest.raises(ValueError, match=r"hidden_states must be of a floating type; got .*int64"):
        run(block, step, hidden.long(), block.allocate_state(2))
