# SPDX-License-Identifier: Apache-2.0
"""The extensions' raw operators, in every calling convention, against autograd."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compare import gradients
from mamba_ssm_definitions import BATCH, DIM, LENGTH, STATES, assert_same, random, scan_inputs
from mambablock.compat import (
    causal_conv1d_cuda,
    selective_scan_cuda,
    selective_scan_cuda_core,
    selective_scan_cuda_oflex,
)
from mambablock.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update, cpp_functions
from mambablock.compat.mamba_ssm import selective_scan_fn

pytestmark = pytest.mark.usefixtures("device")

WIDTH = 4
SEQUENCES = [[0, 0, 0, 1, 2, 2, 2], [4, -1, -1, 3, 3, 7, 8]]


def conv_tensors() -> list[Tensor]:
    return [random(BATCH, DIM, LENGTH), random(DIM, WIDTH), random(DIM)]


def states() -> Tensor:
    return random(BATCH, DIM, WIDTH - 1)


def seq_idx() -> Tensor:
    return torch.tensor(SEQUENCES, dtype=torch.int32)


def autograd_of(function: Any, tensors: list[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the sum of the outputs by the weights."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    return torch.autograd.grad(outputs, leaves, weights)


# The convolution


def test_forward_conventions() -> None:
    tensors, initial = conv_tensors(), states()
    fwd = causal_conv1d_cuda.causal_conv1d_fwd
    plain = causal_conv1d_fn(*tensors, activation="silu")
    assert_same(fwd(*tensors, True), plain)
    assert_same(fwd(*tensors, False), causal_conv1d_fn(*tensors))
    packed = causal_conv1d_fn(*tensors, seq_idx=seq_idx(), activation="silu")
    assert_same(fwd(*tensors, seq_idx(), True), packed)
    expected, last = causal_conv1d_fn(
        *tensors, initial_states=initial, return_final_states=True, activation="silu"
    )
    final = torch.full_like(initial, torch.nan)
    assert_same(fwd(*tensors, None, initial, final, True), expected)
    assert_same(final, last)
    out, final = torch.full_like(plain, torch.nan), torch.full_like(initial, torch.nan)
    assert fwd(*tensors, None, initial, out, final, True) is None
    assert_same((out, final), (expected, last))


@pytest.mark.parametrize("packed", [False, True])
def test_backward_conventions(packed: bool) -> None:
    tensors, initial, dout = conv_tensors(), states(), random(BATCH, DIM, LENGTH)
    bwd = causal_conv1d_cuda.causal_conv1d_bwd
    options = {"seq_idx": seq_idx()} if packed else {}
    conv = partial(causal_conv1d_fn, activation="silu", **options)
    expected = autograd_of(lambda *t: (conv(*t),), tensors, dout)
    if not packed:
        assert_same(bwd(*tensors, dout, None, True), expected)
    given = options.get("seq_idx")
    dx = torch.full_like(dout, torch.nan)
    found = bwd(*tensors, dout, given, dx, True)
    assert found[0] is dx
    assert_same(found, expected)

    with_states = autograd_of(
        lambda x, w, b, s: (conv(x, w, b, initial_states=s),), [*tensors, initial], dout
    )
    found = bwd(*tensors, dout, given, initial, None, None, True, True)
    assert_same(found, with_states)
    assert bwd(*tensors, dout, given, initial, None, None, False, True)[3] is None
    places = [torch.full_like(t, torch.nan) for t in with_states]
    assert bwd(*tensors, dout, given, initial, None, *places, True) is None
    assert_same(tuple(places), with_states)
    assert_same(
        cpp_functions.causal_conv1d_bwd_function(
            *tensors, dout, given, initial, None, None, True, True
        ),
        with_states,
    )


def test_backward_of_final_states() -> None:
    tensors, dout, dstates = conv_tensors(), random(BATCH, DIM, LENGTH), states()
    conv = partial(causal_conv1d_fn, return_final_states=True)
    expected = autograd_of(lambda *t: conv(*t), tensors, dout, dstates)
    found = causal_conv1d_cuda.causal_conv1d_bwd(
        *tensors, dout, None, None, dstates, None, False, False
    )
    assert_same(found[:3], expected)


def test_update_conventions() -> None:
    x, weight, bias = conv_tensors()
    update = causal_conv1d_cuda.causal_conv1d_update
    lengths, rows = torch.tensor([5, 2]), torch.tensor([2, 0])
    for rest, options in (
        ((), {}),
        ((lengths,), {"cache_seqlens": lengths}),
        ((None, rows), {"conv_state_indices": rows}),
    ):
        mine = random(3 if "conv_state_indices" in options else BATCH, DIM, 5)
        theirs = mine.clone()
        expected = causal_conv1d_update(x, theirs, weight, bias, "silu", **options)
        assert_same(update(x, mine, weight, bias, True, *rest), expected)
        assert_same(mine, theirs)
    mine = random(3, DIM, 5)
    theirs, out = mine.clone(), torch.full_like(x, torch.nan)
    expected = causal_conv1d_update(x, theirs, weight, bias, None, None, rows)
    assert update(x, mine, weight, bias, out, False, None, rows) is None
    assert_same((out, mine), (expected, theirs))


def test_works_where_autograd_is_off() -> None:
    """As inside a custom operator, below autograd's dispatch key."""
    tensors, dout = [t.requires_grad_() for t in conv_tensors()], random(BATCH, DIM, LENGTH)
    scan = scan_arguments(scan_inputs())
    with torch._C._AutoDispatchBelowAutograd():
        y = causal_conv1d_cuda.causal_conv1d_fwd(*tensors, True)
        found = causal_conv1d_cuda.causal_conv1d_bwd(*tensors, dout, None, True)
        z, x, _ = selective_scan_cuda.fwd(*scan, True)
        selective_scan_cuda.bwd(*scan, dout, x, z, None, True, True)
    assert not y.requires_grad
    assert_same(found, autograd_of(lambda *t: causal_conv1d_fn(*t, "silu"), tensors, dout))


def test_another_number_of_arguments() -> None:
    tensors = conv_tensors()
    for name, count, expected in (
        ("causal_conv1d_fwd", 3, "4, 5, 7 or 8"),
        ("causal_conv1d_bwd", 5, "6, 7, 10 or 12"),
        ("causal_conv1d_update", 6, "5, 6, 7 or 8"),
    ):
        function = getattr(causal_conv1d_cuda, name)
        with pytest.raises(TypeError, match=rf"^{name}: expected {expected} arguments, by .*; got"):
            function(*tensors, *[None] * count)


def test_errors_have_the_raw_names() -> None:
    x, weight, bias = conv_tensors()
    message = r"^causal_conv1d_fwd: bias must be \(dim=4\); got \(3,\)$"
    with pytest.raises(ValueError, match=message):
        causal_conv1d_cuda.causal_conv1d_fwd(x, weight, bias[1:], None, None, None, True)
    message = r"^causal_conv1d_bwd: dout must be \(batch=2, dim=4, seqlen=7\); got \(2, 4, 6\)$"
    with pytest.raises(ValueError, match=message):
        causal_conv1d_cuda.causal_conv1d_bwd(x, weight, bias, x[..., 1:], None, True)
    tensors = scan_arguments(scan_inputs() | {"u": random(BATCH, DIM, LENGTH - 1)})
    message = r"^fwd: delta must be \(batch=2, dim=4, seqlen=6\).*; got \(2, 4, 7\)$"
    with pytest.raises(ValueError, match=message):
        selective_scan_cuda.fwd(*tensors, True)


# The scan


def scan_arguments(tensors: dict[str, Any]) -> list[Any]:
    """By position, as the extension has them."""
    return [tensors.get(n) for n in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]


SCANS = [("varying", "varying"), ("one group", "one group"), ("groups", "groups")]
SCANS += [("constant", "constant"), ("constant", "groups"), ("varying", "constant")]


@pytest.mark.parametrize(("B", "C"), SCANS)
@pytest.mark.parametrize("absent", [(), ("z",), ("D", "delta_bias")])
def test_scan(B: str, C: str, absent: tuple[str, ...]) -> None:
    tensors = {k: t for k, t in scan_inputs(B, C).items() if k not in absent}
    arguments, dout = scan_arguments(tensors), random(BATCH, DIM, LENGTH)
    scan = partial(selective_scan_fn, delta_softplus=True, return_last_state=True)
    expected, last_state = scan(**tensors)
    ungated = scan(**tensors | {"z": None})[0]
    out, x, *rest = selective_scan_cuda.fwd(*arguments, True)
    assert_same(out, ungated)
    assert_same(x[:, :, -1, 1::2], last_state)
    assert_same([out, *rest][-1], expected)

    wanted = dict(zip(tensors, autograd_of_scan(tensors, dout), strict=True))
    dz = torch.full_like(dout, torch.nan) if "z" in tensors else None
    recompute = dz is not None
    *found, last = selective_scan_cuda.bwd(
        *arguments, dout, x, out if recompute else None, dz, True, recompute
    )
    if recompute:
        assert_same(last, expected)
        assert found[7] is dz
    else:
        found.append(last)
    names = ["u", "delta", "A", "B", "C", "D", "delta_bias", *(["z"] if recompute else [])]
    for name, gradient in zip(names, found, strict=True):
        if name in tensors:
            assert_same(gradient, wanted[name], msg=lambda m, n=name: f"d{n}: {m}")
        else:
            assert gradient is None
    # A copy of x, or none, has no states to start from.
    again = selective_scan_cuda.bwd(*arguments, dout, None, out, None, True, False)
    torch.testing.assert_close(again[:7], found[:7], rtol=0, atol=0)


def autograd_of_scan(tensors: dict[str, Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    def function(*leaves: Tensor) -> tuple[Tensor]:
        named = dict(zip(tensors, leaves, strict=True))
        return (selective_scan_fn(**named, delta_softplus=True),)

    return autograd_of(function, list(tensors.values()), dout)


def test_x_keeps_the_states_through_an_autograd_function(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Tensor:
            out, x, gated = selective_scan_cuda.fwd(*arguments, True)
            ctx.save_for_backward(*arguments, x, out)
            return gated

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> Any:
            *arguments, x, out = ctx.saved_tensors
            assert x.saved_states is not None
            du, ddelta, dA, dB, dC, dD, dbias, dz = selective_scan_cuda.bwd(
                *arguments, dout, x, out, None, True, False
            )
            return du, ddelta, dA, dB, dC, dD, dz, dbias

    arguments = scan_arguments(scan_inputs())
    mine, theirs = ([t.clone().requires_grad_() for t in arguments] for _ in range(2))
    assert_same(
        gradients([Scan.apply(*mine)], mine),
        gradients([selective_scan_fn(*theirs, delta_softplus=True)], theirs),
    )


def test_core() -> None:
    tensors = scan_inputs("groups", "groups") | {"z": None}
    arguments, dout = scan_arguments(tensors), random(BATCH, DIM, LENGTH)
    del arguments[6]
    out, x = selective_scan_cuda_core.fwd(*arguments, True, 1)
    del tensors["z"]
    assert_same(out, selective_scan_fn(**tensors, delta_softplus=True))
    found = selective_scan_cuda_core.bwd(*arguments, dout, x, True, 1)
    assert_same(tuple(found), autograd_of_scan(tensors, dout))


@pytest.mark.parametrize("runs", [1, 2])
def test_oflex(runs: int) -> None:
    tensors = scan_inputs("groups", "groups")
    del tensors["z"]
    tensors["delta"] = tensors["delta"][:, : DIM // runs]
    tensors["delta_bias"] = tensors["delta_bias"][: DIM // runs]
    arguments, dout = list(tensors.values()), random(BATCH, DIM, LENGTH)

    def repeated(u: Tensor, delta: Tensor, *rest: Tensor) -> tuple[Tensor]:
        *others, bias = rest
        delta, bias = delta.repeat_interleave(runs, dim=1), bias.repeat_interleave(runs)
        return (selective_scan_fn(u, delta, *others, delta_bias=bias, delta_softplus=True),)

    out, x = selective_scan_cuda_oflex.fwd(*arguments, True, 1, True)
    assert_same(out, repeated(*arguments)[0])
    found = selective_scan_cuda_oflex.bwd(*arguments, dout, x, True, 1)
    assert_same(tuple(found), autograd_of(repeated, arguments, dout))


@pytest.mark.parametrize("out_float", [False, True])
def test_oflex_in_bfloat16(out_float: bool) -> None:
    tensors = {n: t.float() for n, t in scan_inputs("groups", "groups").items() if n != "z"}
    for name in ("u", "delta", "B", "C"):
        tensors[name] = tensors[name].bfloat16()
    arguments = list(tensors.values())
    out, x = selective_scan_cuda_oflex.fwd(*arguments, True, 1, out_float)
    assert out.dtype is (torch.float32 if out_float else torch.bfloat16)
    exact = {name: t.double() for name, t in tensors.items()}
    # Float32 sums, rounded to bfloat16 or not.
    rtol = 1e-4 if out_float else 2**-7
    oracle = selective_scan_fn(**exact, delta_softplus=True)
    torch.testing.assert_close(out.double(), oracle, rtol=rtol, atol=1e-4)
    dout = random(BATCH, DIM, LENGTH).to(out.dtype)
    found = selective_scan_cuda_oflex.bwd(*arguments, dout, x, True, 1)
    assert [g.dtype for g in found] == [t.dtype for t in arguments]
    for gradient, wanted in zip(found, autograd_of_scan(exact, dout.double()), strict=True):
        torch.testing.assert_close(
            # One rounding, and float32 sums.
            *(gradient.double(), wanted),
            rtol=2**-7,
            atol=1e-3,
        )


def test_complex() -> None:
    tensors = scan_inputs()
    tensors["A"] = torch.complex(-torch.rand(DIM, STATES).double(), random(DIM, STATES))
    tensors |= {name: random(BATCH, 1, STATES, 2 * LENGTH) for name in ("B", "C")}
    arguments, dout = scan_arguments(tensors), random(BATCH, DIM, LENGTH)
    out, x, gated = selective_scan_cuda.fwd(*arguments, True)
    y, last_state = selective_scan_fn(**tensors, delta_softplus=True, return_last_state=True)
    assert_same(gated, y)
    assert_same(gated, out * F.silu(tensors["z"]))
    assert_same(x[:, :, -1, 1::2], last_state)
    found = selective_scan_cuda.bwd(*arguments, dout, x, out, None, True, False)
    du, ddelta, dA, dB, dC, dD, dz, dbias = autograd_of_scan(tensors, dout)
    assert_same(tuple(found), (du, ddelta, dA, dB, dC, dD, dbias, dz))
