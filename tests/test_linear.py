# SPDX-License-Identifier: Apache-2.0
"""mambablock.linear: F.linear of few rows, and where it is F.linear itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import opcheck

from compare import assert_same_bits, reversed_strides
from mambablock import build_info, linear
from mambablock.linear import MOST_ROWS
from operators import DTYPES, Calls

OP = torch.ops.mambablock.linear.default


def make_inputs(
    rows: int = 3, in_features: int = 70, out_features: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (rows, in_features), (out_features, in_features), (out_features,)
    x, weight, bias = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return x, weight, bias


def is_few_rows(function: Any, *arguments: Any) -> bool:
    """Whether the operator computes it."""
    with Calls() as calls:
        function(*arguments)
    return len(calls.of("mambablock::linear")) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 16])
@pytest.mark.parametrize("in_features", [1, 31, 32, 70, 1000])
@pytest.mark.parametrize("out_features", [0, 1, 19])
@pytest.mark.parametrize("bias", [None, "own", "float32"])
def test_values(
    dtype: torch.dtype, rows: int, in_features: int, out_features: int, bias: str | None
) -> None:
    x, weight, b = make_inputs(rows, in_features, out_features, dtype)
    b = None if bias is None else b.float() if bias == "float32" else b
    y = OP(x, weight, b)
    assert y.dtype == dtype
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    # One rounding to the type, and 32 partial sums of some dozen terms in the accumulator's.
    accumulator = torch.promote_types(dtype, torch.float32)
    magnitude = F.linear(x.double().abs(), weight.double().abs()) + 4
    bound = 4 * torch.finfo(accumulator).eps * magnitude + torch.finfo(dtype).eps / 2 * exact.abs()
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_rows_and_threads(dtype: torch.dtype) -> None:
    x, weight, bias = make_inputs(7, 1000, 333, dtype)
    y = OP(x, weight, bias)
    for row in range(7):
        assert_same_bits(OP(x[row : row + 1], weight, bias)[0], y[row])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same_bits(OP(x, weight, bias), y)
    finally:
        torch.set_num_threads(threads)


DIGEST = """
import hashlib, torch, mambablock
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    x, weight, bias = (torch.randn(s).to(dtype) for s in ((3, 345), (21, 345), (21,)))
    y = torch.ops.mambablock.linear(x, weight, bias)
    digest.update(y.view(torch.uint8).numpy().tobytes())
print(mambablock.build_info()["simd_level"], digest.hexdigest())
"""


def test_same_bits_at_every_simd_level() -> None:
    info = build_info()
    levels = info["simd_levels_built"][: info["simd_levels_built"].index(info["simd_level"]) + 1]
    found = dict(
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=os.environ | {"MAMBABLOCK_SIMD": level},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for level in levels
    )
    assert list(found) == levels
    assert len(set(found.values())) == 1


def test_any_strides() -> None:
    x, weight, bias = make_inputs(3, 40, 30)
    y = linear(x, weight, bias)
    wide = torch.zeros(30, 50)
    wide[:, 5:45] = weight
    assert_same_bits(linear(x, wide[:, 5:45], bias), y)
    assert_same_bits(linear(reversed_strides(x), reversed_strides(weight), bias), y)
    assert_same_bits(linear(x.expand(2, 3, 40), weight, bias), y.expand(2, 3, 30))
    assert_same_bits(linear(x[0], weight, bias), y[0])


class Subclass(Tensor):
    pass


def test_where_it_is_torchs() -> None:
    x, weight, bias = make_inputs()
    most = MOST_ROWS[torch.float32]
    assert is_few_rows(linear, x, weight, bias)
    assert is_few_rows(linear, x.expand(1, 3, 70), weight)
    assert not is_few_rows(linear, torch.zeros(most + 1, 70), weight)
    assert not is_few_rows(linear, x, nn.Parameter(weight))
    assert not is_few_rows(linear, x, weight.as_subclass(Subclass))
    assert not is_few_rows(linear, *(t.to("meta") for t in (x, weight)))
    with torch.no_grad():
        assert is_few_rows(linear, x, nn.Parameter(weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_few_rows(linear, x, weight)
        assert linear(x, weight).dtype == torch.bfloat16


def test_gradients() -> None:
    tensors = [t.double().requires_grad_() for t in make_inputs()]
    torch.autograd.gradcheck(linear, tensors)


def test_vmap_and_jvp() -> None:
    x, weight, bias = make_inputs()
    stacked = torch.stack([x, 2 * x])
    got = torch.vmap(linear, (0, None, None))(stacked, weight, bias)
    torch.testing.assert_close(got, F.linear(stacked, weight, bias))
    weights, biases = torch.stack([weight, -weight], 1), torch.stack([bias, 3 * bias])
    got = torch.vmap(linear, (None, 1, 0))(x, weights, biases)
    torch.testing.assert_close(got[1], F.linear(x, -weight, 3 * bias))
    _, tangent = torch.func.jvp(lambda x: linear(x, weight, bias), (x,), (x,))
    torch.testing.assert_close(tangent, F.linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(dtype: torch.dtype, bias: bool) -> None:
    x, weight, b = make_inputs(dtype=dtype)
    opcheck(OP, (x, weight, b if bias else None))


@torch.no_grad()
def test_compiles_and_exports() -> None:
    layer = nn.Linear(70, 5)
    x, weight, bias = make_inputs()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x, weight, bias), linear(x, weight, bias))

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, self.layer.weight, self.layer.bias)

    for shapes, few in ((None, True), ({"x": {0: torch.export.Dim("rows", max=64)}}, False)):
        program = torch.export.export(Head(), (x,), dynamic_shapes=shapes)
        assert ("mambablock.linear" in str(program.graph)) == few
        torch.testing.assert_close(program.module()(x), layer(x))


BAD_CALLS: list[tuple[int, Any, str]] = [
    (0, lambda t: t[0], "x must be (rows, in_features); got (70,)"),
    (0, lambda t: t.int(), "x must be float32, bfloat16, float16 or float64; got Int"),
    (0, lambda t: t[:, :0], "in_features must be at least 1; got 0"),
    (1, lambda t: t[0], "weight must be (out_features, in_features); got (70,)"),
    (1, lambda t: t[:, 1:], "weight must be (out_features=5, in_features=70); got (5, 69)"),
    (1, lambda t: t.half(), "weight must be float32 as x; got float16"),
    (1, lambda t: t.to("meta"), "weight must be on cpu as x; got meta"),
    (2, lambda t: t[1:], "bias must be (out_features=5); got (4,)"),
    (2, lambda t: t.double(), "bias must be float32; got float64"),
]


@pytest.mark.parametrize(
    ("index", "change", "message"), BAD_CALLS, ids=lambda v: None if callable(v) else str(v)[:40]
)
def test_bad_calls(index: int, change: Any, message: str) -> None:
    arguments = list(make_inputs())
    arguments[index] = change(arguments[index])
    with pytest.raises(RuntimeError, match=re.escape(f"linear: {message}")):
        OP(*arguments)


@pytest.mark.parametrize(("index", "name"), list(enumerate(("x", "weight", "bias"))))
def test_argument_that_is_no_tensor(index: int, name: str) -> None:
    arguments: list[Any] = list(make_inputs())
    arguments[index] = [1.0]
    with pytest.raises(TypeError, match=f"^linear: {name} must be a Tensor.*; got list$"):
        linear(*arguments)
