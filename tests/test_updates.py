# SPDX-License-Identifier: Apache-2.0
"""causal_conv1d_update and selective_state_update against their definitions and the full ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mambablock
from mambablock import reference
from operators import causal_conv1d_update_inputs as conv_inputs
from operators import selective_state_update_inputs as scan_inputs

pytestmark = pytest.mark.usefixtures("device")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def both(name: str, tensors: dict[str, Any], **options: Any) -> None:
    """The op and its definition give the same y and state, to a rounding or two of their types."""
    activations = tensors["x" if "x" in tensors else "u"]
    results = []
    for module in (mambablock, reference):
        state = tensors["state"].clone()
        y = getattr(module, name)(**(tensors | {"state": state}), **options)
        results.append((y, state))
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        # Sums of some dozen terms in another order, in the accumulator's type whatever the state's;
        # lower types may round to the neighbour.
        sums = 1e-12 if activations.dtype == torch.float64 else 1e-5
        tolerance = max(10 * torch.finfo(got.dtype).eps, sums)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_types(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    conv, scan = conv_inputs(dtype=dtype), scan_inputs(dtype=dtype)
    both("causal_conv1d_update", conv | {"state": conv["state"].to(state_dtype)}, silu=True)
    both(
        "selective_state_update",
        scan | {"state": scan["state"].to(state_dtype)},
        delta_softplus=True,
    )


@pytest.mark.parametrize("width", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("silu", [False, True])
def test_conv_widths(width: int, silu: bool) -> None:
    both("causal_conv1d_update", conv_inputs(width=width), silu=silu)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("d_inner", [1, 6, 2000])
@pytest.mark.parametrize("d_state", [1, 5, 16, 17, 40])
def test_scan_sizes(batch: int, d_inner: int, d_state: int) -> None:
    both("selective_state_update", scan_inputs(batch, d_inner, d_state), delta_softplus=True)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_groups(groups: int) -> None:
    both("selective_state_update", scan_inputs(2, 6, 3, groups))


@pytest.mark.parametrize("absent", ["D", "z", "delta_bias"])
def test_scan_optional_arguments(absent: str) -> None:
    both("selective_state_update", scan_inputs() | {absent: None})


def test_conv_without_bias() -> None:
    both("causal_conv1d_update", conv_inputs() | {"bias": None})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_state_indices(dtype: torch.dtype) -> None:
    indices = torch.tensor([5, -1, 0], dtype=dtype)
    conv, scan = conv_inputs(), scan_inputs()
    conv["state"], scan["state"] = (
        torch.randn(7, 3, 5, dtype=torch.float64),
        torch.randn(7, 4, 3, dtype=torch.float64),
    )
    both("causal_conv1d_update", conv, state_indices=indices)
    both("selective_state_update", scan, state_indices=indices)
    before = scan["state"].clone()
    y = mambablock.selective_state_update(**scan, state_indices=indices)
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    untouched = [1, 2, 3, 4, 6]
    assert torch.equal(scan["state"][untouched], before[untouched])
    assert not torch.equal(scan["state"][5], before[5])


def test_strided_state_and_inputs() -> None:
    conv, scan = conv_inputs(), scan_inputs()
    for tensors, name in ((conv, "causal_conv1d_update"), (scan, "selective_state_update")):
        for key, t in list(tensors.items()):
            order = list(reversed(range(t.dim())))
            tensors[key] = t.permute(order).contiguous().permute(order)
        both(name, tensors)
        state = tensors["state"].clone(memory_format=torch.preserve_format)
        expected = tensors["state"].contiguous()
        getattr(mambablock, name)(**(tensors | {"state": state}))
        getattr(mambablock, name)(**(tensors | {"state": expected}))
        assert torch.equal(state, expected)


def test_steps_are_the_full_ops() -> None:
    length, conv, scan = 12, conv_inputs(2), scan_inputs(2)
    # dt from -30 to 25, where softplus changes its form.
    delta = torch.linspace(-30, 25, length, dtype=torch.float64).view(1, -1, 1).expand(2, -1, 4)
    x = torch.randn(2, length, 5, dtype=torch.float64)
    u, z = (torch.randn(2, length, 4, dtype=torch.float64) for _ in range(2))
    B, C = (torch.randn(2, length, 3, dtype=torch.float64) for _ in range(2))
    parameters = {key: scan[key] for key in ("A", "D", "delta_bias")}
    full_conv, conv_state = mambablock.causal_conv1d(
        x,
        conv["weight"],
        bias=conv["bias"],
        silu=True,
        initial_state=conv["state"],
        return_final_state=True,
    )
    full_scan, scan_state = mambablock.selective_scan(
        u,
        delta,
        **parameters,
        B=B,
        C=C,
        z=z,
        delta_softplus=True,
        initial_state=scan["state"],
        return_final_state=True,
    )
    for t in range(length):
        y = mambablock.causal_conv1d_update(**(conv | {"x": x[:, t]}), silu=True)
        torch.testing.assert_close(y, full_conv[:, t])
        y = mambablock.selective_state_update(
            scan["state"],
            u[:, t],
            delta[:, t],
            **parameters,
            B=B[:, t],
            C=C[:, t],
            z=z[:, t],
            delta_softplus=True,
        )
        torch.testing.assert_close(y, full_scan[:, t])
    assert torch.equal(conv["state"], conv_state)
    torch.testing.assert_close(scan["state"], scan_state)


def test_opcheck() -> None:
    conv, scan = conv_inputs(dtype=torch.float32), scan_inputs(dtype=torch.float32)
    torch.library.opcheck(
        torch.ops.mambablock.causal_conv1d_update, (*conv.values(), True, torch.tensor([2, 0, -1]))
    )
    torch.library.opcheck(torch.ops.mambablock.selective_state_update, (*scan.values(), True, None))


CONV_BAD_CALLS: list[tuple[str, Any, str]] = [
    ("x", lambda t: t[0], r"x must be \(batch, d_inner\); got \(5,\)"),
    ("x", lambda t: t.long(), "x must be float32, bfloat16, float16 or float64; got Long"),
    ("state", lambda t: t[:2], "state must be of batch=3 rows; got 2"),
    ("state", lambda t: t[:, 1:], r"state must be \(rows=3, d_conv - 1=3, d_inner=5\)"),
    ("state", lambda t: t[0], r"state must be \(rows, d_conv - 1, d_inner\); got \(3, 5\)"),
    ("state", lambda t: t.int(), "state must be float32, bfloat16, float16 or float64; got Int"),
    ("weight", lambda t: t[1:], r"weight must be \(d_inner=5, d_conv=4\); got \(4, 4\)"),
    ("weight", lambda t: t.half(), "weight must be float64; got float16"),
    ("bias", lambda t: t[1:], r"bias must be \(d_inner=5\); got \(4,\)"),
    ("state_indices", [0, 1], r"state_indices must be \(batch=3\); got \(2,\)"),
    ("state_indices", [0.0, 1.0, 2.0], "state_indices must be int32 or int64; got float32"),
]
SCAN_BAD_CALLS: list[tuple[str, Any, str]] = [
    ("u", lambda t: t[None], r"u must be \(batch, d_inner\); got \(1, 3, 4\)"),
    ("delta", lambda t: t[:, :1], r"delta must be \(batch=3, d_inner=4\); got \(3, 1\)"),
    ("delta", lambda t: t.half(), "delta must be float64 as u; got float16"),
    ("A", lambda t: t[:, 0], r"A must be \(d_inner, d_state\); got \(4,\)"),
    ("B", lambda t: t[:, :2], r"B must be \(batch=3, d_state=3\); got \(3, 2\)"),
    ("C", lambda t: t.float(), "C must be float64 as u; got float32"),
    ("D", lambda t: t[:1], r"D must be \(d_inner=4\); got \(1,\)"),
    ("z", lambda t: t.mT, r"z must be \(batch=3, d_inner=4\); got \(4, 3\)"),
    ("delta_bias", lambda t: t.half(), "delta_bias must be float64; got float16"),
    ("state", lambda t: t.mT, r"state must be \(rows=3, d_inner=4, d_state=3\); got \(3, 3, 4\)"),
]


@pytest.mark.parametrize(("name", "change", "message"), CONV_BAD_CALLS)
def test_conv_bad_calls(name: str, change: Any, message: str) -> None:
    tensors = conv_inputs()
    tensors[name] = torch.tensor(change) if isinstance(change, list) else change(tensors[name])
    with pytest.raises(RuntimeError, match="causal_conv1d_update: " + message):
        mambablock.causal_conv1d_update(**tensors)


@pytest.mark.parametrize(("name", "change", "message"), SCAN_BAD_CALLS)
def test_scan_bad_calls(name: str, change: Any, message: str) -> None:
    tensors = scan_inputs()
    tensors[name] = torch.tensor(change) if isinstance(change, list) else change(tensors[name])
    with pytest.raises(RuntimeError, match="selective_state_update: " + message):
        mambablock.selective_state_update(**tensors)


on_the_host = pytest.mark.cpu_kernels("on CUDA no value of state_indices is read on the host")


@on_the_host
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1, 3], "state_indices must be below the state's 3 rows; got 3"),
        ([1, 0, 1], "state_indices must be distinct; got 1 twice"),
    ],
)
def test_bad_values_of_state_indices(values: list[int], message: str) -> None:
    indices = torch.tensor(values)
    with pytest.raises(RuntimeError, match="causal_conv1d_update: " + message):
        mambablock.causal_conv1d_update(**conv_inputs(), state_indices=indices)
    with pytest.raises(RuntimeError, match="selective_state_update: " + message):
        mambablock.selective_state_update(**scan_inputs(), state_indices=indices)


@on_the_host
def test_a_bad_call_changes_nothing() -> None:
    tensors = scan_inputs()
    before = tensors["state"].clone()
    with pytest.raises(RuntimeError):
        mambablock.selective_state_update(**tensors, state_indices=torch.tensor([0, 1, 99]))
    assert torch.equal(tensors["state"], before)
