# SPDX-License-Identifier: Apache-2.0
"""What compat's functions refuse: in the names and the layout of the function that was called."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mamba_ssm_definitions import (
    BATCH,
    DIM,
    LENGTH,
    STATES,
    inner_arguments,
    make_mamba,
    scan_inputs,
    update_inputs,
)
from mambablock.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mambablock.compat.mamba_ssm import (
    Mamba,
    mamba_inner_fn,
    selective_scan_fn,
    selective_state_update,
)

pytestmark = pytest.mark.usefixtures("device")

WIDTH = 4
B_FORMS = "(dim=4, dstate=3) or (batch=2, dstate=3, seqlen=7) or (batch=2, groups, dstate=3, seqlen"


def conv_inputs() -> dict[str, Any]:
    return {
        "weight": torch.randn(DIM, WIDTH),
        "bias": torch.randn(DIM),
        "x": torch.randn(BATCH, DIM, LENGTH),
        "initial_states": torch.randn(BATCH, DIM, WIDTH - 1),
    }


def step_inputs(state_len: int = WIDTH - 1) -> dict[str, Any]:
    return {
        "weight": torch.randn(DIM, WIDTH),
        "bias": torch.randn(DIM),
        "x": torch.randn(BATCH, DIM),
        "conv_state": torch.randn(BATCH, DIM, state_len),
    }


def heads_inputs() -> dict[str, Any]:
    return update_inputs(heads=True)


def block_inputs() -> dict[str, Any]:
    return inner_arguments(make_mamba())


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "scan": (selective_scan_fn, scan_inputs),
    "inner": (mamba_inner_fn, block_inputs),
    "update": (selective_state_update, update_inputs),
    "update of heads": (selective_state_update, heads_inputs),
    "conv": (causal_conv1d_fn, conv_inputs),
    "conv step": (causal_conv1d_update, step_inputs),
    "conv step, longer state": (causal_conv1d_update, lambda: step_inputs(WIDTH + 1)),
}


def call(kind: str, **changed: Any) -> Any:
    function, make_inputs = CALLS[kind]
    return function(**make_inputs() | changed)


def refused(kind: str, error: type[Exception], message: str, **changed: Any) -> None:
    with pytest.raises(error, match="^" + re.escape(f"{CALLS[kind][0].__name__}: {message}")):
        call(kind, **changed)


TENSORS = [(kind, name) for kind, (_, make) in CALLS.items() for name in make()]


@pytest.mark.parametrize(("kind", "name"), TENSORS)
def test_arguments_that_are_no_tensors(kind: str, name: str) -> None:
    for value, got in (([1.0], "list of 1"), (np.zeros((2, 3)), "ndarray"), ("x", "'x'")):
        refused(kind, TypeError, f"{name} must be a Tensor; got {got}", **{name: value})
    optional = (*("D", "z", "delta_bias", "dt_bias", "bias"), "initial_states", "conv1d_bias")
    if name not in (*optional, "out_proj_bias"):
        refused(kind, TypeError, f"{name} must be a Tensor; got None", **{name: None})


@pytest.mark.parametrize(("kind", "name"), TENSORS)
def test_arguments_on_another_device(kind: str, name: str) -> None:
    value = CALLS[kind][1]()[name].to("meta")
    with pytest.raises(ValueError, match=rf"^{CALLS[kind][0].__name__}: \w+ must be on .* as \w+"):
        call(kind, **{name: value})


@pytest.mark.parametrize(("kind", "name"), [k for k in TENSORS if k[1] != "out_proj_bias"])
def test_arguments_of_other_dimensions(kind: str, name: str) -> None:
    value = CALLS[kind][1]()[name]
    for bad in (value[None, None, None], value.flatten()[0]):
        shape = re.escape(str(tuple(bad.shape)))
        expected = rf"^{CALLS[kind][0].__name__}: {name} must be \(.*; got {shape}$"
        with pytest.raises(ValueError, match=expected):
            call(kind, **{name: bad})


SHAPES: list[tuple[str, dict[str, tuple[int, ...]], str]] = [
    ("scan", {"u": (2, 7, 4)}, "u must be (batch, dim=4, seqlen); got (2, 7, 4)"),
    ("scan", {"delta": (2, 4, 6)}, "delta must be (batch=2, dim=4, seqlen=7); got (2, 4, 6)"),
    ("scan", {"z": (2, 7, 4)}, "z must be (batch=2, dim=4, seqlen=7); got (2, 7, 4)"),
    ("scan", {"B": (2, 7, 3)}, f"B must be {B_FORMS}=7); got (2, 7, 3)"),
    ("scan", {"B": (2, 3)}, f"B must be {B_FORMS}=7); got (2, 3)"),
    ("scan", {"C": (1, 4, 3, 7)}, f"C must be {B_FORMS}=7); got (1, 4, 3, 7)"),
    ("scan", {"B": (2, 3, 3, 7)}, "groups must be a divisor of dim=4; got 3"),
    ("scan", {"B": (2, 0, 3, 7)}, "groups must be a divisor of dim=4; got 0"),
    ("scan", {"D": (3,)}, "D must be (dim=4); got (3,)"),
    ("inner", {"xz": (2, 7, 32)}, "xz must be (batch, 2 * dim=32, seqlen); got (2, 7, 32)"),
    (
        "inner",
        {"conv1d_weight": (16, 4, 1)},
        "conv1d_weight must be (dim, 1, width); got (16, 4, 1",
    ),
    ("inner", {"x_proj_weight": (16, 7)}, "x_proj_weight must be (rows, dim=16); got (16, 7)"),
    ("inner", {"x_proj_weight": (6, 16)}, "x_proj_weight must be of 7 rows, for delta and each of"),
    ("inner", {"out_proj_weight": (16,)}, "out_proj_weight must be (d_model, dim=16); got (16,)"),
    ("inner", {"A": (16, 2)}, "x_proj_weight must be of 5 rows"),
    ("inner", {"B_proj_bias": (2,)}, "B_proj_bias must be (dstate=3); got (2,)"),
    ("inner", {"dt_rms_weight": (3,)}, "dt_rms_weight must be (dim=16); got (3,)"),
    ("update", {"state": (2, 3, 4)}, "state must be (batch=2, dim=4, dstate=3); got (2, 3, 4)"),
    ("update", {"state": (3, 4, 3)}, "state must be (batch=2, dim=4, dstate=3); got (3, 4, 3)"),
    ("update", {"x": (2, 5)}, "x must be (batch, dim=4); got (2, 5)"),
    ("update", {"dt": (1, 4)}, "dt must be (batch=2, dim=4); got (1, 4)"),
    ("update", {"C": (2, 4)}, "C must be (batch=2, dstate=3) or (batch=2, groups, dstate=3); got"),
    ("update of heads", {"x": (2, 4, 2)}, "x must be (batch, heads=2, dim=4); got (2, 4, 2)"),
    ("update of heads", {"D": (4, 2)}, "D must be (heads=2, dim=4); got (4, 2)"),
    ("update of heads", {"state": (2, 4, 2, 3)}, "state must be (batch=2, heads=2, dim=4, dstat"),
    ("conv", {"x": (2, 7, 4)}, "x must be (batch, dim=4, seqlen); got (2, 7, 4)"),
    ("conv", {"weight": (4, 1, 4)}, "weight must be (dim, width); got (4, 1, 4)"),
    (
        "conv",
        {"initial_states": (2, 3, 4)},
        "initial_states must be (batch=2, dim=4, width - 1=3);",
    ),
    ("conv step", {"x": (2, 1, 4)}, "x must be (batch, dim=4) or (batch, dim=4, seqlen); got (2, "),
    ("conv step", {"conv_state": (3, 4, 3)}, "conv_state must be (batch=2, dim=4, state_len); got"),
    ("conv step", {"conv_state": (2, 3, 4)}, "conv_state must be (batch=2, dim=4, state_len); got"),
    ("conv step, longer state", {"conv_state": (1, 4, 5)}, "conv_state must be (batch=2, dim=4, s"),
    ("conv step, longer state", {"x": (2, 3)}, "x must be (batch, dim=4) or (batch, dim=4, seqle"),
]


@pytest.mark.parametrize(("kind", "shapes", "message"), SHAPES)
def test_wrong_shapes(kind: str, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    dtype = next(iter(CALLS[kind][1]().values())).dtype
    changed = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    refused(kind, ValueError, message, **changed)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("scan", "u"),
        ("inner", "xz"),
        ("inner", "x_proj_weight"),
        ("update", "x"),
        ("update", "state"),
        ("conv", "x"),
        ("conv step", "conv_state"),
        ("conv step, longer state", "conv_state"),
        ("conv step, longer state", "x"),
    ],
)
def test_integers_are_no_activations(kind: str, name: str) -> None:
    value = CALLS[kind][1]()[name].long()
    refused(
        kind, ValueError, f"{name} must be of a floating type; got torch.int64", **{name: value}
    )


def test_types_of_parameters() -> None:
    """The operators' own errors, under the caller's names."""
    narrow = {name: tensor.float() for name, tensor in update_inputs().items()}
    wide, half = torch.randn(DIM).double(), torch.randn(DIM).half()
    message = "dt_bias must be float32; got float64"
    refused("update", RuntimeError, message, **narrow | {"dt_bias": wide})
    narrow = {name: tensor.float() for name, tensor in scan_inputs().items()}
    refused("scan", RuntimeError, "D must be float32; got float64", **narrow | {"D": wide})
    refused("conv", RuntimeError, "bias must be float32; got float16", bias=half)
    refused("inner", RuntimeError, "conv1d_bias must be ", conv1d_bias=torch.randn(16).half())
    weight = torch.randn(8, 16)
    message = "out_proj_weight must be torch.float64 as xz; got (8, 16) of torch.float32"
    refused("inner", ValueError, message, out_proj_weight=weight)


INDICES = [
    ("update", "state_batch_indices"),
    ("conv step", "conv_state_indices"),
    ("conv step, longer state", "conv_state_indices"),
    ("conv step", "cache_seqlens"),
    ("conv step, longer state", "cache_seqlens"),
]


@pytest.mark.parametrize(("kind", "name"), INDICES)
def test_bad_indices(kind: str, name: str) -> None:
    refused(kind, TypeError, f"{name} must be a Tensor; got list of 2", **{name: [0, 1]})
    for bad, message in (
        (torch.tensor([0.0, 1.0]), "int32 or int64; got torch.float32"),
        (torch.tensor([[0, 1]]), "(batch=2); got (1, 2)"),
        (torch.tensor([0, 1, 0]), "(batch=2); got (3,)"),
    ):
        refused(kind, ValueError, f"{name} must be {message}", **{name: bad})


@pytest.mark.parametrize(("kind", "name"), INDICES[:3])
@pytest.mark.cpu_kernels("on CUDA no value of indices is read on the host")
def test_indices_past_the_end(kind: str, name: str) -> None:
    message = f"{name} must be below the state's 2 rows; got 5"
    refused(kind, ValueError, message, **{name: torch.tensor([0, 5])})


def test_bad_seq_idx() -> None:
    seq_idx = torch.zeros(BATCH, LENGTH, dtype=torch.int32)
    refused("conv", TypeError, "seq_idx must be a Tensor; got list of 2", seq_idx=[[0] * 7] * 2)
    refused("conv", ValueError, "seq_idx must be on ", seq_idx=seq_idx.to("meta"))
    short = torch.randn(BATCH, DIM, 2)
    message = "initial_states must be (batch=2, dim=4, width - 1=3); got (2, 4, 2)"
    refused("conv", ValueError, message, seq_idx=seq_idx, initial_states=short)


def test_bad_final_states_out() -> None:
    out = torch.zeros(BATCH, DIM, WIDTH - 1)
    for bad, error, message in (
        (out.long(), ValueError, "must be of a floating type; got torch.int64"),
        (out.to("meta"), ValueError, "must be on "),
        (out[..., 1:], ValueError, "must be (batch=2, dim=4, width - 1=3); got (2, 4, 2)"),
        ([0.0], TypeError, "must be a Tensor; got list of 1"),
    ):
        changed = {"final_states_out": bad, "return_final_states": True}
        refused("conv", error, f"final_states_out {message}", **changed)


def test_checkpoint_lvl_of_text() -> None:
    refused("inner", ValueError, "checkpoint_lvl must be 0 or 1; got '1'", checkpoint_lvl="1")


def test_missing_arguments_are_python_s() -> None:
    with pytest.raises(TypeError, match=r"missing 5 required positional arguments: 'u', 'delta'"):
        selective_scan_fn()


@pytest.mark.parametrize("given", ["B", "both"])
def test_x_proj_may_have_rows_of_what_is_given(given: str) -> None:
    """mamba-ssm uses only those that it needs."""
    tensors = block_inputs()
    tensors |= {name: torch.randn(BATCH, STATES, LENGTH).double() for name in "BC"}
    if given == "B":
        del tensors["C"]
    whole = mamba_inner_fn(**tensors)
    kept = [0, *range(1 + STATES, 1 + 2 * STATES)] if given == "B" else [0]
    tensors["x_proj_weight"] = tensors["x_proj_weight"][kept]
    torch.testing.assert_close(mamba_inner_fn(**tensors), whole, rtol=1e-12, atol=0)


# Mamba


def test_mamba_names_itself() -> None:
    with pytest.raises(TypeError, match=r"^Mamba: d_model must be an integer; got '8'"):
        Mamba("8")
    block = Mamba(8)
    with pytest.raises(TypeError, match=r"^Mamba: hidden_states must be a Tensor; got None"):
        block(None)
    with pytest.raises(ValueError, match=r"^Mamba: hidden_states must be torch.float32 as "):
        block(torch.zeros(2, 7, 8).long())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 1), ValueError, "batch_size must not be negative; got -1"),
        ((2.5, 1), TypeError, "batch_size must be an integer; got 2.5"),
        (("2", 1), TypeError, "batch_size must be an integer; got '2'"),
        ((2, 1, torch.int32), ValueError, "dtype must be torch.float32, .*; got torch.int32"),
        ((2, 1, "float32"), TypeError, "dtype must be torch.float32, .*; got 'float32'"),
    ],
)
def test_bad_allocate_inference_cache(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^Mamba: {message}"):
        Mamba(8).allocate_inference_cache(*arguments)


def params(offset: int, cache: Any) -> SimpleNamespace:
    return SimpleNamespace(seqlen_offset=offset, key_value_memory_dict=cache)


@pytest.mark.parametrize(
    "bad", [{}, "x", (1, 2), SimpleNamespace(seqlen_offset=0), params(0, None)]
)
def test_inference_params_without_a_cache(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"^Mamba: inference_params must have seqlen_offset and "):
        Mamba(8, layer_idx=0)(torch.zeros(2, 1, 8), bad)


def test_bad_hidden_states_enter_nothing_into_the_cache() -> None:
    given = params(0, {})
    with pytest.raises(ValueError, match=r"^Mamba: hidden_states must be torch.float32 as "):
        Mamba(8, layer_idx=0)(torch.zeros(2, 1, 8).long(), given)
    assert not given.key_value_memory_dict


@pytest.mark.parametrize("how", ["step", "prefill", "decode"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c, s: (None, s), TypeError, "conv_state must be a Tensor; got None"),
        (lambda c, s: (c, [1]), TypeError, "ssm_state must be a Tensor; got list of 1"),
        (
            lambda c, s: (c[:1], s),
            ValueError,
            "conv_state must be (batch=2, d_inner=16, state_len)",
        ),
        (lambda c, s: (c[..., 2:], s), ValueError, "conv_state must hold at least d_conv - 1 = 3"),
        (lambda c, s: (s, c), ValueError, "ssm_state must be (batch=2, d_inner=16, d_state=5);"),
        (
            lambda c, s: (c, s.long()),
            ValueError,
            "ssm_state must be of a floating type; got torch.",
        ),
        (lambda c, s: (c.to("meta"), s), ValueError, "conv_state must be on "),
        (lambda c, s: (c, s.to("meta")), ValueError, "ssm_state must be on "),
    ],
)
def test_bad_states_of_mamba(
    how: str, change: Callable[[Tensor, Tensor], Any], error: type[Exception], message: str
) -> None:
    block = Mamba(8, d_state=5, layer_idx=0)
    states = change(*(torch.ones_like(t) for t in block.allocate_inference_cache(2, 1)))
    hidden = torch.zeros(2, 1, 8)
    given = params(int(how == "decode"), {0: states})
    run = partial(block.step, hidden, *states) if how == "step" else partial(block, hidden, given)
    with torch.no_grad(), pytest.raises(error, match="^Mamba: " + re.escape(message)):
        run()
    for state in states:
        assert not isinstance(state, Tensor) or state.is_meta or (state == 1).all()


def test_bad_step_of_mamba() -> None:
    block = Mamba(8)
    states = block.allocate_inference_cache(2, 1)
    for bad, message in (
        (torch.zeros(2, 8), r"(batch, 1, d_model=8); got (2, 8)"),
        (torch.zeros(2, 1, 7), r"(batch, 1, d_model=8); got (2, 1, 7)"),
        (torch.zeros(2, 1, 8).long(), "torch.float32 as the parameters; got torch.int64"),
    ):
        expected = "^Mamba: step's hidden_states must be " + re.escape(message)
        with pytest.raises(ValueError, match=expected):
            block.step(bad, *states)
