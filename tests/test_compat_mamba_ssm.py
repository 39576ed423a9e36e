# SPDX-License-Identifier: Apache-2.0
"""compat.mamba_ssm against the definitions of mamba-ssm's functions, written out."""

from __future__ import annotations

import inspect
import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compare import assert_float64_equal
from compare import results as gradients
from mamba_ssm_definitions import (
    BATCH,
    DIM,
    LENGTH,
    SHAPES,
    STATES,
    assert_same,
    inner_arguments,
    inner_definition,
    make_mamba,
    random,
    scan_definition,
    scan_inputs,
    update_definition,
    update_inputs,
)
from mambablock.compat.mamba_ssm import (
    Mamba,
    mamba_inner_fn,
    selective_scan_fn,
    selective_state_update,
)
from mambablock.compat.mamba_ssm.ops.selective_scan_interface import (
    bimamba_inner_fn,
    bimamba_inner_ref,
    mamba_inner_fn_no_out_proj,
    mamba_inner_ref,
    selective_scan_ref,
)
from mambablock.compat.mamba_ssm.ops.triton.selective_state_update import (
    selective_state_update_ref,
)

pytestmark = pytest.mark.usefixtures("device")

SIGNATURES = {
    selective_scan_fn: "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, "
    "return_last_state=False",
    mamba_inner_fn: "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, "
    "out_proj_weight, out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, "
    "C_proj_bias=None, delta_softplus=True, checkpoint_lvl=1, b_rms_weight=None, "
    "c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-06",
    selective_state_update: "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, "
    "dt_softplus=False, state_batch_indices=None",
    Mamba: "d_model, d_state=16, d_conv=4, expand=2, dt_rank='auto', dt_min=0.001, dt_max=0.1, "
    "dt_init='random', dt_scale=1.0, dt_init_floor=0.0001, conv_bias=True, bias=False, "
    "use_fast_path=True, layer_idx=None, device=None, dtype=None, "
    # Vision Mamba's and those of its like.
    "bimamba_type='none', if_divide_out=False, init_layer_scale=None, bimamba=None, nslices=5",
    Mamba.forward: "self, hidden_states, inference_params=None",
    Mamba.step: "self, hidden_states, conv_state, ssm_state",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_signatures(function: Any) -> None:
    plain = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    assert str(inspect.Signature(plain)) == f"({SIGNATURES[function]})"


# selective_scan_fn


# B and C that vary in time have the same groups.
PAIRS = [
    (B, C)
    for B, C in itertools.product(SHAPES, SHAPES)
    if B == C or "constant" in (B, C) or "groups" not in (B, C)
]


@pytest.mark.parametrize(("B", "C"), PAIRS)
def test_scan_is_the_definition(B: str, C: str) -> None:
    tensors = scan_inputs(B, C)
    scan = partial(selective_scan_fn, delta_softplus=True, return_last_state=True)
    definition = partial(scan_definition, delta_softplus=True)
    assert_float64_equal(
        gradients(lambda **t: scan(**t), tensors), gradients(lambda **t: definition(**t), tensors)
    )


@pytest.mark.parametrize("absent", ["D", "z", "delta_bias"])
def test_scan_without(absent: str) -> None:
    tensors = {k: t for k, t in scan_inputs().items() if k != absent}
    y = selective_scan_fn(**tensors)
    assert isinstance(y, Tensor)
    assert_same(y, scan_definition(**tensors)[0])


@pytest.mark.parametrize("B", ["varying", "constant"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scan_in_low_precision(B: str, dtype: torch.dtype) -> None:
    """Constant B and C are parameters, in float32 whatever u is; so are A, D and delta_bias."""
    tensors = {
        k: t.to(dtype if t.dim() == 3 else torch.float32) for k, t in scan_inputs(B, B).items()
    }
    y, last_state = selective_scan_fn(**tensors, delta_softplus=True, return_last_state=True)
    oracle, h = scan_definition(**{k: t.double() for k, t in tensors.items()}, delta_softplus=True)
    assert y.dtype is dtype
    assert last_state.dtype is torch.float32
    # One rounding of y; float32 sums within.
    torch.testing.assert_close(y.double(), oracle, rtol=torch.finfo(dtype).eps, atol=1e-4)
    torch.testing.assert_close(last_state.double(), h, rtol=1e-5, atol=1e-5)


def complex_inputs(pairs: bool) -> dict[str, Tensor]:
    """With B and C complex, or as real and imaginary parts in turn."""
    states = torch.view_as_complex(random(BATCH, 2, STATES, LENGTH, 2).contiguous())
    B, C = states.unbind(1)
    A = torch.complex(-torch.rand(DIM, STATES).double(), random(DIM, STATES))
    if pairs:
        B, C = (torch.view_as_real(t).flatten(-2) for t in (B, C))
    return scan_inputs() | {"A": A, "B": B, "C": C}


@pytest.mark.parametrize("scan", [selective_scan_fn, selective_scan_ref])
@pytest.mark.parametrize("pairs", [False, True])
def test_complex_A_is_conjugate_pairs_of_states(pairs: bool, scan: Any) -> None:
    tensors = complex_inputs(pairs)
    y, last_state = scan(**tensors, delta_softplus=True, return_last_state=True)
    B, C = tensors["B"], tensors["C"]
    if pairs:
        B, C = (torch.view_as_complex(t.unflatten(-1, (LENGTH, 2))) for t in (B, C))
    A = torch.cat([tensors["A"], tensors["A"].conj()], dim=1)
    B, C = (torch.cat([t, t.conj()], dim=1) for t in (B, C))
    wide = {"A": A, "B": B, "C": C}
    expected, h = scan_definition(**tensors | wide, delta_softplus=True)
    assert_same(y, expected.real)
    assert_same(last_state, h[..., :STATES])


def test_complex_A_has_gradients() -> None:
    tensors = {name: t.requires_grad_() for name, t in complex_inputs(pairs=True).items()}
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *t: selective_scan_fn(**dict(zip(names, t, strict=True)), delta_softplus=True),
        list(tensors.values()),
    )


def test_complex_A_in_the_block() -> None:
    block = make_mamba()
    A = torch.complex(-block.A_log.exp(), random(16, STATES)).detach()
    tensors = inner_arguments(block) | {"A": A, "x_proj_weight": random(1 + 4 * STATES, 16)}
    x, z = tensors["xz"].chunk(2, dim=1)
    x = F.silu(F.conv1d(F.pad(x, (3, 0)), block.conv1d.weight, block.conv1d.bias, groups=16))
    dt, *pairs = (tensors["x_proj_weight"] @ x).split([1, 2 * STATES, 2 * STATES], dim=1)
    pairs = [t.unflatten(1, (STATES, 2)).movedim(2, -1).contiguous() for t in pairs]
    B, C = map(torch.view_as_complex, pairs)
    y = selective_scan_fn(
        *(x, block.dt_proj.weight @ dt, A, B, C, block.D, z, block.dt_proj.bias, True)
    )
    expected = F.linear(y.transpose(1, 2), block.out_proj.weight, block.out_proj.bias)
    assert_same(mamba_inner_fn(**tensors), expected)
    assert_same(mamba_inner_ref(**tensors), expected)


def test_complex_A_where_it_is_refused() -> None:
    A = torch.zeros(DIM, STATES, dtype=torch.complex64)
    with pytest.raises(NotImplementedError, match=r"^selective_state_update: A must be real"):
        selective_state_update(*[torch.zeros(1, 1)] * 3, A, *[None] * 2)
    with pytest.raises(
        ValueError, match=r"^selective_scan_fn: B must be .*2 \* seqlen=14.*\(2, 3, 7"
    ):
        selective_scan_fn(**scan_inputs() | {"A": A})


def test_scan_and_update_compile() -> None:
    torch.compiler.reset()
    compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
    tensors = scan_inputs()
    assert_same(compiled(selective_scan_fn)(**tensors), selective_scan_fn(**tensors))
    mine = update_inputs()
    theirs = {name: tensor.clone() for name, tensor in mine.items()}
    assert_same(compiled(selective_state_update)(**mine), selective_state_update(**theirs))
    assert_same(mine["state"], theirs["state"])


# mamba_inner_fn


@pytest.mark.parametrize("checkpoint_lvl", [0, 1])
@pytest.mark.parametrize("kind", ["plain", "proj_bias", "rms", "given B", "constant B"])
def test_inner_is_the_definition(kind: str, checkpoint_lvl: int) -> None:
    block = make_mamba()
    tensors = inner_arguments(block)
    if kind == "proj_bias":
        tensors |= {"B_proj_bias": random(STATES), "C_proj_bias": random(STATES)}
    elif kind == "rms":
        tensors |= {f"{name}_rms_weight": random(STATES) for name in ("b", "c")}
        tensors["dt_rms_weight"] = random(block.d_inner)
    elif kind != "plain":
        constant = (block.d_inner, STATES)
        tensors["B"] = random(*(constant if kind == "constant B" else SHAPES["varying"]))
        with torch.no_grad():
            tensors["x_proj_weight"] = tensors["x_proj_weight"][: 1 + STATES]
    inner = partial(mamba_inner_fn, checkpoint_lvl=checkpoint_lvl)
    assert_float64_equal(
        gradients(lambda **t: (inner(**t),), tensors),
        gradients(lambda **t: inner_definition(**t), tensors),
    )


def test_inner_keeps_less_with_checkpoint_lvl_1() -> None:
    kept = {}
    for level in (0, 1):
        tensors = inner_arguments(make_mamba())
        found: dict[int, int] = {}

        def pack(t: Tensor, found: dict[int, int] = found) -> Tensor:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = mamba_inner_fn(**tensors, checkpoint_lvl=level)
        kept[level] = sum(found.values())
        assert y.requires_grad
    # The convolution's output and delta are not kept.
    assert kept[0] - kept[1] >= 2 * BATCH * 16 * LENGTH * 8


def test_inner_in_bfloat16_with_a_float32_bias() -> None:
    block = make_mamba(dtype=torch.bfloat16)
    tensors = inner_arguments(block)
    tensors["xz"] = tensors["xz"].to(torch.bfloat16)
    tensors["out_proj_bias"] = tensors["out_proj_bias"].float()
    got = mamba_inner_fn(**tensors)
    assert got.dtype is torch.bfloat16
    exact = inner_definition(**{k: t.double() for k, t in tensors.items()})[0]
    # Four roundings, of 2^-9 each, on the way.
    scale = exact.abs().max().item()
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=0.02 * scale)


def test_inner_checkpoint_lvl() -> None:
    with pytest.raises(ValueError, match=r"checkpoint_lvl must be 0 or 1; got 2"):
        mamba_inner_fn(**inner_arguments(make_mamba()), checkpoint_lvl=2)


# selective_state_update


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("absent", [(), ("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")])
@pytest.mark.parametrize("dt_softplus", [False, True])
def test_update_is_the_definition(heads: bool, absent: tuple[str, ...], dt_softplus: bool) -> None:
    tensors = {k: t for k, t in update_inputs(heads).items() if k not in absent}
    expected, state = update_definition(**tensors, dt_softplus=dt_softplus)
    assert_same(selective_state_update(**tensors, dt_softplus=dt_softplus), expected)
    assert_same(tensors["state"], state)


def test_update_with_groups_and_no_heads() -> None:
    tensors = update_inputs()
    expected, _ = update_definition(**tensors)
    tensors |= {name: tensors[name][:, None] for name in ("B", "C")}
    assert_same(selective_state_update(**update_inputs() | tensors), expected)


def test_update_of_chosen_states() -> None:
    tensors = update_inputs()
    states = random(5, DIM, STATES)
    expected_states = states.clone()
    expected, expected_states[3:4] = (
        t[1:] for t in update_definition(**tensors | {"state": states[[0, 3]]})
    )
    tensors["state"] = states
    y = selective_state_update(**tensors, state_batch_indices=torch.tensor([-1, 3]))
    assert_same(y[1:], expected)
    assert not y[0].any()
    assert_same(states, expected_states)


def test_update_in_place_in_bfloat16() -> None:
    tensors = {
        k: t.to(torch.float32 if k in ("A", "D") else torch.bfloat16)
        for k, t in update_inputs().items()
    }
    exact, state = update_definition(**{k: t.double() for k, t in tensors.items()})
    y = selective_state_update(**tensors)
    assert y.dtype is torch.bfloat16
    # Each is rounded once.
    for mine, oracle in ((y, exact), (tensors["state"], state)):
        torch.testing.assert_close(mine.double(), oracle, rtol=2**-8, atol=1e-6)


def test_update_with_mixed_types() -> None:
    tensors = update_inputs()
    exact, _ = update_definition(**tensors)
    tensors = {
        k: t.to(torch.bfloat16 if k in ("x", "D") else torch.float32) for k, t in tensors.items()
    }
    y = selective_state_update(**tensors)
    assert y.dtype is torch.bfloat16
    # x and D are rounded, then y.
    scale = exact.abs().max().item()
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=0.03 * scale)


def test_softplus_in_decode_is_that_of_prefill() -> None:
    tensors = scan_inputs()
    tensors = {k: t.float() for k, t in tensors.items()}
    tensors["delta"] = torch.linspace(-30, 25, LENGTH).expand(BATCH, DIM, LENGTH)
    y, last_state = selective_scan_fn(**tensors, delta_softplus=True, return_last_state=True)
    state = torch.zeros(BATCH, DIM, STATES)
    steps = [
        selective_state_update(
            state,
            *(tensors[k][..., t] for k in ("u", "delta")),
            tensors["A"],
            *(tensors[k][..., t] for k in ("B", "C")),
            D=tensors["D"],
            z=tensors["z"][..., t],
            dt_bias=tensors["delta_bias"],
            dt_softplus=True,
        )
        for t in range(LENGTH)
    ]
    # Float32 rounding of a short sum.
    assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    assert_close(torch.stack(steps, dim=-1), y)
    assert_close(state, last_state)


# Definitions, and Vision Mamba's functions


def test_references() -> None:
    tensors = scan_inputs("groups", "constant")
    for options in ({}, {"delta_softplus": True, "return_last_state": True}):
        assert_same(
            selective_scan_ref(**tensors, **options), selective_scan_fn(**tensors, **options)
        )
    inner = inner_arguments(make_mamba())
    assert_same(mamba_inner_ref(**inner), mamba_inner_fn(**inner))
    for heads in (False, True):
        mine = update_inputs(heads)
        theirs = mine | {"state": mine["state"].clone()}
        assert_same(selective_state_update_ref(**mine), selective_state_update(**theirs))
        assert_same(mine["state"], theirs["state"])


@pytest.mark.parametrize("absent", [(), ("D", "conv1d_bias")])
def test_inner_without_its_projection(absent: tuple[str, ...]) -> None:
    tensors = inner_arguments(make_mamba()) | dict.fromkeys(absent)
    y = mamba_inner_fn_no_out_proj(
        **{k: t for k, t in tensors.items() if not k.startswith("out_proj")}
    )
    assert y.shape == (BATCH, 16, LENGTH)
    projected = F.linear(y.transpose(1, 2), tensors["out_proj_weight"], tensors["out_proj_bias"])
    assert_same(projected, mamba_inner_fn(**tensors))


def bimamba_definition(**t: Any) -> tuple[Tensor]:
    """With flips, and scan_definition."""
    x, z = t["xz"].chunk(2, dim=1)
    x = F.silu(F.conv1d(F.pad(x, (3, 0)), t["conv1d_weight"], t["conv1d_bias"], groups=16))
    rank = t["delta_proj_weight"].shape[1]
    dt, B, C = (t["x_proj_weight"] @ x).split([rank, STATES, STATES], dim=1)
    inputs = (x, t["delta_proj_weight"] @ dt)
    rest = (t["D"], z, t["delta_bias"], True)
    y, _ = scan_definition(*inputs, t["A"], B, C, *rest)
    flipped = (f.flip(-1) for f in (*inputs, B, C))
    u, delta, B, C = flipped
    y_b, _ = scan_definition(u, delta, t["A_b"], B, C, t["D"], z.flip(-1), t["delta_bias"], True)
    y = (y + y_b.flip(-1)).transpose(1, 2)
    return (F.linear(y, t["out_proj_weight"], t["out_proj_bias"]),)


def test_bimamba_is_the_definition() -> None:
    tensors = inner_arguments(make_mamba())
    tensors["A_b"] = -torch.rand(16, STATES).double()
    for function in (bimamba_inner_fn, bimamba_inner_ref):
        assert_float64_equal(
            gradients(lambda f=function, **t: (f(**t),), tensors),
            gradients(bimamba_definition, tensors),
        )


def test_errors_of_vision_mambas_functions() -> None:
    tensors = inner_arguments(make_mamba())
    tensors["A_b"] = random(3, STATES)
    with pytest.raises(
        ValueError, match=r"^bimamba_inner_fn: A_b must be \(dim=16, dstate=3\); got"
    ):
        bimamba_inner_fn(**tensors)
    del tensors["A_b"], tensors["out_proj_weight"], tensors["out_proj_bias"]
    message = r"^mamba_inner_fn_no_out_proj: x_proj_weight must be of 7 rows"
    with pytest.raises(ValueError, match=message):
        mamba_inner_fn_no_out_proj(**tensors | {"x_proj_weight": random(8, 16)})
