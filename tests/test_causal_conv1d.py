# SPDX-License-Identifier: Apache-2.0
"""causal_conv1d against its definition, reference.causal_conv1d."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mambablock
from compare import (
    assert_as_exact_as_pytorch,
    assert_float64_equal,
    boundaries,
    gradients,
    rows_of,
    time_last,
)
from mambablock import reference
from operators import LOW_PRECISION
from operators import causal_conv1d_inputs as make_inputs

pytestmark = pytest.mark.usefixtures("device")

OPTIONS: dict[str, Any] = {"silu": True, "return_final_state": True}


def both(tensors: dict[str, Tensor | None], **options: Any) -> None:
    options = OPTIONS | options
    assert_float64_equal(
        gradients(lambda **t: mambablock.causal_conv1d(**t, **options), tensors),
        gradients(lambda **t: reference.causal_conv1d(**t, **options), tensors),
    )


@pytest.mark.parametrize("length", [0, 1, 2, 3, 64, 127, 128, 129, 131, 261])
@pytest.mark.parametrize("width", [1, 2, 4, 5, 70])
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_and_widths(length: int, width: int, reverse: bool) -> None:
    both(make_inputs(length=length, width=width), reverse=reverse)


@pytest.mark.parametrize("d_inner", [1, 8, 31, 128, 129, 300])
@pytest.mark.parametrize("silu", [False, True])
def test_channels(d_inner: int, silu: bool) -> None:
    both(make_inputs(1, 6, d_inner), silu=silu)


@pytest.mark.parametrize("absent", ["bias", "initial_state"])
def test_optional_arguments(absent: str) -> None:
    both(make_inputs() | {absent: None})


def test_no_batch() -> None:
    both(make_inputs(0, 5))


@pytest.mark.parametrize("lengths", [[5], [0, 1, 0, 2, 125, 1, 140, 0], [128, 128], [1] * 9, []])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed(lengths: list[int], reverse: bool, dtype: torch.dtype) -> None:
    tensors = make_inputs(1, sum(lengths), 3, states=len(lengths))
    both(tensors, cu_seqlens=boundaries(lengths, dtype), reverse=reverse)


def test_nan_stays_in_its_sequence() -> None:
    tensors = make_inputs(1, 12, 3, states=2)
    tensors["x"][:, 4] = float("nan")
    for reverse in (False, True):
        y = mambablock.causal_conv1d(**tensors, cu_seqlens=boundaries([6, 6]), reverse=reverse)
        assert y[:, 6:].isfinite().all()


def test_reverse_is_flipped() -> None:
    tensors = make_inputs(length=70)
    y, state = mambablock.causal_conv1d(**tensors, **OPTIONS, reverse=True)
    flipped = tensors | {"x": tensors["x"].flip(1)}
    expected, expected_state = mambablock.causal_conv1d(**flipped, **OPTIONS)
    assert torch.equal(y, expected.flip(1))
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("lengths", [[5], [64], [75], [300], [3, 0, 66, 231]])
@pytest.mark.parametrize("d_inner", [260, 263])
@pytest.mark.parametrize("reverse", [False, True])
def test_memory_layouts_give_the_same_bits(
    lengths: list[int], dtype: torch.dtype, d_inner: int, reverse: bool
) -> None:
    # Several blocks of channels, the last one no whole number of vectors.
    batch, states, cu_seqlens = rows_of(lengths)
    tensors = make_inputs(batch, sum(lengths), d_inner, states=states, dtype=dtype)
    x = tensors.pop("x")
    dy, dfinal_state = torch.randn_like(x), torch.randn_like(tensors["initial_state"])
    options = OPTIONS | {"cu_seqlens": cu_seqlens, "reverse": reverse}

    def bits(x: Tensor, dy: Tensor) -> list[Tensor]:
        leaves = {n: t.detach().requires_grad_() for n, t in (tensors | {"x": x}).items()}
        outputs = mambablock.causal_conv1d(**leaves, **options)
        return [*outputs, *torch.autograd.grad(outputs, leaves.values(), (dy, dfinal_state))]

    expected = bits(x, dy)
    for other in ((time_last(x), time_last(dy)), (time_last(x), dy), (x, time_last(dy))):
        assert all(torch.equal(a, b) for a, b in zip(bits(*other), expected, strict=True))


@pytest.mark.parametrize("cuts", [[1], [128], [1, 2, 3, 100]])
def test_streaming_is_the_full_forward(cuts: list[int]) -> None:
    tensors = make_inputs(length=140)

    def pieces(x: Tensor, initial_state: Tensor, **t: Tensor) -> tuple[Tensor, Tensor]:
        state, ys = initial_state, []
        for begin, end in zip([0, *cuts], [*cuts, 140], strict=True):
            y, state = mambablock.causal_conv1d(
                x[:, begin:end], initial_state=state, **t, **OPTIONS
            )
            ys.append(y)
        return torch.cat(ys, 1), state

    assert_float64_equal(
        gradients(pieces, tensors),
        gradients(lambda **t: mambablock.causal_conv1d(**t, **OPTIONS), tensors),
    )


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("parameters", ["float32", "as activations"])
def test_low_precision(dtype: torch.dtype, parameters: str) -> None:
    tensors = make_inputs(2, 70, 24, dtype=dtype)
    if parameters == "as activations":
        tensors |= {name: tensors[name].to(dtype) for name in ("weight", "bias")}
    exact = {name: t.double() for name, t in tensors.items()}
    assert_as_exact_as_pytorch(
        gradients(lambda **t: mambablock.causal_conv1d(**t, **OPTIONS), tensors),
        gradients(lambda **t: reference.causal_conv1d(**t, **OPTIONS), tensors),
        gradients(lambda **t: reference.causal_conv1d(**t, **OPTIONS), exact),
    )


@given(data=st.data())
def test_strides_shapes_and_options(data: st.DataObject) -> None:
    tensors = make_inputs(
        data.draw(st.integers(0, 3)),
        data.draw(st.integers(0, 70)),
        data.draw(st.integers(1, 20)),
        data.draw(st.integers(1, 6)),
    )
    for name in ("bias", "initial_state"):
        if data.draw(st.booleans()):
            tensors[name] = None
    for name, t in tensors.items():
        layout = data.draw(st.sampled_from(["contiguous", "transposed", "slice"]))
        if t is None:
            continue
        if layout == "transposed":
            order = list(reversed(range(t.dim())))
            tensors[name] = t.permute(order).contiguous().permute(order)
        elif layout == "slice":
            wide = torch.randn(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype)
            wide[..., 1::2] = t
            tensors[name] = wide[..., 1::2]
    both(tensors, silu=data.draw(st.booleans()), reverse=data.draw(st.booleans()))


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse: bool) -> None:
    tensors = {n: t.requires_grad_() for n, t in make_inputs(2, 5, 2).items()}
    names = list(tensors)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(names, values, strict=True))
        return mambablock.causal_conv1d(**named, **OPTIONS, reverse=reverse)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    tensors = make_inputs(2, 66, 4, dtype=torch.float32)
    for t in tensors.values():
        t.requires_grad_(requires_grad)
    arguments = (*tensors.values(), None, True, False)
    torch.library.opcheck(torch.ops.mambablock.causal_conv1d, arguments)
    if not requires_grad:
        y, state = torch.ops.mambablock.causal_conv1d(*arguments)
        torch.library.opcheck(torch.ops.mambablock.causal_conv1d_backward, (y, state, *arguments))


def test_direct_call_differentiates() -> None:
    tensors = make_inputs()
    assert_float64_equal(
        gradients(
            lambda **t: torch.ops.mambablock.causal_conv1d(*t.values(), None, True, False), tensors
        ),
        gradients(lambda **t: mambablock.causal_conv1d(**t, **OPTIONS), tensors),
    )


def test_second_derivative_is_an_error() -> None:
    tensors = {n: t.requires_grad_() for n, t in make_inputs().items()}
    y = mambablock.causal_conv1d(**tensors)
    (dx,) = torch.autograd.grad(y.sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="causal_conv1d: its backward must be differentiated at"):
        dx.sum().backward()


@pytest.mark.parametrize("mapped", ["x", "weight", "all"])
def test_vmap_and_func_grad(mapped: str) -> None:
    tensors = make_inputs(2, 5, 4)
    names = list(tensors)
    in_dims = tuple(0 if mapped in (name, "all") else None for name in names)
    stacked = [
        torch.stack([t, t * 0.5, t * 0.7]) if dim == 0 else t
        for t, dim in zip(tensors.values(), in_dims, strict=True)
    ]

    def loss(*values: Tensor) -> Tensor:
        y, state = mambablock.causal_conv1d(**dict(zip(names, values, strict=True)), **OPTIONS)
        return (y**2).sum() + state.sum()

    got = torch.func.vmap(torch.func.grad(loss, tuple(range(4))), in_dims)(*stacked)
    for i in range(3):
        leaves = [
            (t[i] if dim == 0 else t).clone().requires_grad_()
            for t, dim in zip(stacked, in_dims, strict=True)
        ]
        for g, e in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(g[i], e)


def test_compiles_fullgraph() -> None:
    tensors = make_inputs(dtype=torch.float32)
    compiled = torch.compile(mambablock.causal_conv1d, fullgraph=True, backend="aot_eager")
    got = gradients(lambda **t: compiled(**t, **OPTIONS), tensors)
    for name, value in gradients(
        lambda **t: mambablock.causal_conv1d(**t, **OPTIONS), tensors
    ).items():
        assert torch.equal(got[name], value), name


@pytest.mark.cpu_kernels("the threads of the host run no part of a CUDA kernel")
def test_threads_give_the_same_bits() -> None:
    tensors = make_inputs(2, 200, 300, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(gradients(lambda **t: mambablock.causal_conv1d(**t, **OPTIONS), tensors))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(result[name], value), name


BAD_CALLS: list[tuple[str, Any, str]] = [
    ("x", lambda t: t[0], r"x must be \(batch, length, d_inner\); got \(9, 5\)"),
    ("x", lambda t: t.int(), "x must be float32, bfloat16, float16 or float64; got Int"),
    ("x", lambda t: t[..., :0], "d_inner must be at least 1; got 0"),
    ("weight", lambda t: t[:, None], r"weight must be \(d_inner, d_conv\); got \(5, 1, 4\)"),
    ("weight", lambda t: t[:4], r"weight must be \(d_inner=5, d_conv=4\); got \(4, 4\)"),
    ("weight", lambda t: t[:, :0], "d_conv must be at least 1; got 0"),
    ("weight", lambda t: t.float(), "weight must be float64; got float32"),
    ("weight", lambda t: t.to("meta"), "weight must be on (cpu|cuda:0) as x; got meta"),
    ("bias", lambda t: t[:1], r"bias must be \(d_inner=5\); got \(1,\)"),
    ("bias", lambda t: t.half(), "bias must be float64; got float16"),
    ("initial_state", lambda t: t[:, 1:], r"initial_state must be \(batch=2, d_conv - 1=3, d_i"),
    ("initial_state", lambda t: t.mT, r"initial_state must be \(batch=2, d_conv - 1=3, d_inn"),
    ("initial_state", lambda t: t.float(), "initial_state must be float64 for x in float64"),
    ("cu_seqlens", [0, 9], "batch must be 1 with cu_seqlens; got 2"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_CALLS)
def test_bad_calls(name: str, change: Any, message: str) -> None:
    tensors = make_inputs()
    tensors[name] = torch.tensor(change) if isinstance(change, list) else change(tensors[name])
    with pytest.raises(RuntimeError, match="causal_conv1d: " + message):
        mambablock.causal_conv1d(**tensors)


@pytest.mark.cpu_kernels("on CUDA no value of cu_seqlens is read on the host")
@pytest.mark.parametrize("values", [[1, 9], [0, 5], [0, 7, 5, 9], [0, 99, 9], [0, -4, 9]])
def test_bad_values_of_cu_seqlens(values: list[int]) -> None:
    tensors = make_inputs(1) | {"initial_state": None}
    with pytest.raises(RuntimeError, match="causal_conv1d: cu_seqlens must be rising from 0 to le"):
        mambablock.causal_conv1d(**tensors, cu_seqlens=torch.tensor(values))


def test_meta() -> None:
    tensors = {n: t.to("meta") for n, t in make_inputs().items()}
    y, state = mambablock.causal_conv1d(**tensors, return_final_state=True)
    assert (y.shape, state.shape) == ((2, 9, 5), (2, 3, 5))
    assert y.is_meta


def test_outputs_larger_than_the_caches() -> None:
    """What is written past the caches has the bits of what is written through them."""
    torch.manual_seed(0)
    length, d_inner = 4100, 4128  # over 64 MiB of float32; a last vector of channels in each half
    x = torch.randn(1, length, d_inner, requires_grad=True)
    weight = torch.randn(d_inner, 4)
    y = mambablock.causal_conv1d(x, weight, silu=True)
    (dx,) = torch.autograd.grad(y.sum(), x)
    for half in (slice(d_inner // 2), slice(d_inner // 2, None)):
        part = x.detach()[..., half].contiguous().requires_grad_()
        y_part = mambablock.causal_conv1d(part, weight[half], silu=True)
        (dx_part,) = torch.autograd.grad(y_part.sum(), part)
        assert torch.equal(y[..., half], y_part)
        assert torch.equal(dx[..., half], dx_part)
