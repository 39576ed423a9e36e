# SPDX-License-Identifier: Apache-2.0
"""compat.causal_conv1d against the definitions of causal-conv1d's functions, written out."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compare import results as gradients
from mambablock.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

pytestmark = pytest.mark.usefixtures("device")

# Sums of a few float64 products in another order.
assert_same = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The output and the last width - 1 inputs, tap by tap, with the sequences compared."""
    batch, dim, length = x.shape
    width = weight.shape[1]
    if seq_idx is None:
        seq_idx = torch.zeros(batch, length, dtype=torch.int32)
    if initial_states is None:
        initial_states = x.new_zeros(batch, dim, width - 1)
    inputs = torch.cat([initial_states, x], dim=-1)
    owners = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], dim=-1)
    y = torch.zeros_like(x) if bias is None else bias[:, None].expand(x.shape)
    for w in range(width):
        seen = owners[:, w : w + length] == seq_idx
        y = y + weight[:, w, None] * inputs[..., w : w + length] * seen[:, None]
    y = F.silu(y) if activation else y
    return y * (seq_idx >= 0)[:, None], inputs[..., length:]


def make_inputs(batch: int = 2, dim: int = 5, length: int = 9, width: int = 4) -> dict[str, Tensor]:
    random = partial(torch.randn, dtype=torch.float64)
    return {
        "x": random(batch, dim, length),
        "weight": random(dim, width),
        "bias": random(dim),
        "initial_states": random(batch, dim, width - 1),
    }


def test_signatures() -> None:
    assert str(inspect.signature(causal_conv1d_fn, eval_str=False)).split(" ->")[0] == (
        "(x: 'Tensor', weight: 'Tensor', bias: 'Tensor | None' = None, "
        "seq_idx: 'Tensor | None' = None, initial_states: 'Tensor | None' = None, "
        "return_final_states: 'bool' = False, final_states_out: 'Tensor | None' = None, "
        "activation: 'str | None' = None)"
    )
    assert list(inspect.signature(causal_conv1d_update).parameters) == [
        *("x", "conv_state", "weight", "bias", "activation"),
        *("cache_seqlens", "conv_state_indices"),
    ]


# The whole sequence


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("absent", [(), ("bias",), ("initial_states",), ("bias", "initial_states")])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_is_the_definition(activation: str | None, absent: tuple[str, ...], length: int) -> None:
    tensors = {k: v for k, v in make_inputs(length=length).items() if k not in absent}
    assert_same(
        gradients(
            lambda **t: causal_conv1d_fn(**t, activation=activation, return_final_states=True),
            tensors,
        ),
        gradients(lambda **t: definition(**t, activation=activation), tensors),
    )
    only = causal_conv1d_fn(**tensors, activation=activation)
    assert_same(only, definition(**tensors, activation=activation)[0])


SEQUENCES = [[0, 0, 0, 1, 2, 2, 2, 2, 2], [4, -1, -1, 3, 3, 7, 8, 8, -1]]


@pytest.mark.parametrize("absent", [(), ("bias",), ("initial_states",)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_seq_idx(absent: tuple[str, ...], dtype: torch.dtype) -> None:
    tensors = {k: v for k, v in make_inputs().items() if k not in absent}
    options: dict[str, Any] = {
        "seq_idx": torch.tensor(SEQUENCES, dtype=dtype),
        "activation": "silu",
    }
    assert_same(
        gradients(lambda **t: (causal_conv1d_fn(**t, **options),), tensors),
        gradients(lambda **t: definition(**t, **options)[:1], tensors),
    )


def test_seq_idx_of_no_steps() -> None:
    tensors = make_inputs(length=0)
    seq_idx = torch.zeros(2, 0, dtype=torch.int32)
    assert causal_conv1d_fn(**tensors, seq_idx=seq_idx).shape == (2, 5, 0)


def test_final_states_out() -> None:
    tensors = make_inputs()
    out = torch.full((2, 5, 3), torch.nan, dtype=torch.float64)
    y, states = causal_conv1d_fn(**tensors, return_final_states=True, final_states_out=out)
    assert states is out
    assert_same((y, out), definition(**tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    tensors = {name: t.to(dtype) for name, t in make_inputs().items()}
    got = causal_conv1d_fn(**tensors, activation="silu", return_final_states=True)
    exact = definition(**{k: t.double() for k, t in tensors.items()}, activation="silu")
    for mine, oracle in zip(got, exact, strict=True):
        assert mine.dtype is dtype
        # One rounding of the result.
        torch.testing.assert_close(mine.double(), oracle, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("function", [causal_conv1d_fn, causal_conv1d_update])
def test_other_activations(function: Any) -> None:
    tensors = [torch.zeros(2, 3, 4), torch.zeros(2, 3, 3), torch.zeros(3, 4)]
    if function is causal_conv1d_fn:
        del tensors[1]
    with pytest.raises(NotImplementedError, match=f"^{function.__name__}: activation .*'gelu'"):
        function(*tensors, activation="gelu")


def test_bad_arguments() -> None:
    tensors, seq_idx = make_inputs(), torch.tensor(SEQUENCES)
    with pytest.raises(ValueError, match=r"return_final_states must be False with seq_idx"):
        causal_conv1d_fn(**tensors, seq_idx=seq_idx, return_final_states=True)
    with pytest.raises(ValueError, match=r"seq_idx must be \(batch=2, seqlen=9\); got \(2, 8\)"):
        causal_conv1d_fn(**tensors, seq_idx=seq_idx[:, 1:])
    with pytest.raises(ValueError, match=r"conv_state must hold at least width - 1 = 3 inputs"):
        causal_conv1d_update(tensors["x"], tensors["x"][..., :2], tensors["weight"])


# Steps


def in_steps(tensors: dict[str, Tensor], conv_state: Tensor, steps: list[int], **options: Any):
    """causal_conv1d_update over pieces of x; a piece of one step without its dimension of time."""
    outputs, done = [], 0
    for count in steps:
        x = tensors["x"][..., done : done + count]
        if "cache_seqlens" in options:
            options["cache_seqlens"] = torch.full((x.shape[0],), done, dtype=torch.int32)
        y = causal_conv1d_update(
            x.squeeze(-1) if count == 1 else x,
            conv_state,
            tensors["weight"],
            tensors["bias"],
            "silu",
            **options,
        )
        outputs.append(y.unsqueeze(-1) if count == 1 else y)
        done += count
    return torch.cat(outputs, dim=-1)


STEPS = [[1] * 9, [9], [2, 1, 3, 3], [1, 7, 1]]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("state_len", [3, 4, 6])
def test_steps_give_the_whole(steps: list[int], state_len: int) -> None:
    tensors = make_inputs()
    conv_state = torch.full((2, 5, state_len), torch.inf, dtype=torch.float64)
    conv_state[..., -3:] = tensors["initial_states"]
    expected, _ = definition(**tensors, activation="silu")
    assert_same(in_steps(tensors, conv_state, steps), expected)
    # Of nine inputs; a state longer than what was given keeps what it had before.
    assert torch.equal(conv_state, tensors["x"][..., -state_len:])


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("state_len", [3, 4, 6])
def test_ring(steps: list[int], state_len: int) -> None:
    tensors = make_inputs()
    tensors["initial_states"] = torch.zeros(2, 5, 3, dtype=torch.float64)
    conv_state = torch.zeros(2, 5, state_len, dtype=torch.float64)
    got = in_steps(tensors, conv_state, steps, cache_seqlens=None)
    assert_same(got, definition(**tensors, activation="silu")[0])
    places = torch.arange(9 - state_len, 9) % state_len
    assert torch.equal(conv_state[..., places], tensors["x"][..., -state_len:])


@pytest.mark.parametrize("lengths", [None, [5, 2, 8]])
@pytest.mark.parametrize("state_len", [3, 5])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_state_indices(lengths: list[int] | None, state_len: int, dtype: torch.dtype) -> None:
    tensors = make_inputs(batch=3, length=2)
    cache_seqlens = None if lengths is None else torch.tensor(lengths)
    x, weight = tensors["x"], tensors["weight"]
    states = torch.randn(6, 5, state_len, dtype=torch.float64)
    indices = torch.tensor([4, -1, 0], dtype=dtype)
    expected_states = states.clone()
    rows = states[[4, 0]]
    expected = torch.zeros_like(x)
    expected[[0, 2]] = causal_conv1d_update(
        x[[0, 2]], rows, weight, cache_seqlens=None if cache_seqlens is None else cache_seqlens[::2]
    )
    expected_states[[4, 0]] = rows
    got = causal_conv1d_update(
        x, states, weight, cache_seqlens=cache_seqlens, conv_state_indices=indices
    )
    assert_same(got, expected)
    assert_same(states, expected_states)


@pytest.mark.parametrize("state_len", [3, 4])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_states_in_place(state_len: int, x_dtype: torch.dtype) -> None:
    tensors = {name: t.float().to(torch.bfloat16) for name, t in make_inputs().items()}
    conv_state = torch.zeros(2, 5, state_len, dtype=torch.bfloat16)
    conv_state[..., -3:] = tensors["initial_states"]
    exact, _ = definition(**{k: t.double() for k, t in tensors.items()}, activation="silu")
    tensors = {name: t.to(x_dtype) for name, t in tensors.items()}
    got = in_steps(tensors, conv_state, [2, 1, 6])
    assert got.dtype is x_dtype
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(x_dtype).eps, atol=1e-6)
    assert torch.equal(conv_state.to(x_dtype), tensors["x"][..., -state_len:])


def test_no_gradient() -> None:
    tensors = make_inputs()
    weight = tensors["weight"].requires_grad_()
    for state_len in (3, 4):
        conv_state = torch.zeros(2, 5, state_len, dtype=torch.float64)
        assert not causal_conv1d_update(tensors["x"], conv_state, weight).requires_grad
