# SPDX-License-Identifier: Apache-2.0
"""The bounds stated in csrc/common/math.h, at every SIMD level that this processor has."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import mambablock
from mambablock import _C

Function = Callable[[np.ndarray], np.ndarray]

TINY = np.finfo(np.float32).tiny
LOG_TINY = np.log(np.float64(TINY))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 21))))


# Name, oracle in float64, range of inputs, bound in ULP.
BOUNDS: list[tuple[str, Function, float, float, float]] = [
    ("exp2", np.exp2, -126, 127.999, 2),
    ("exp2_in_range", np.exp2, -126, 127.4, 2),
    ("exp", np.exp, -87.336, 88.722, 2),
    ("log1p_unit", np.log1p, 0, 1, 3),
    ("sigmoid", sigmoid, -87.3, np.inf, 4),
    ("silu", lambda x: x * sigmoid(x), -83, np.inf, 4),
    ("softplus", softplus, -87.3, np.inf, 4),
    ("softplus_derivative", lambda x: np.where(x > 20, 1, sigmoid(x)), -87.3, np.inf, 4),
]


def levels() -> list[str]:
    info = mambablock.build_info()
    built: list[str] = info["simd_levels_built"]
    return built[: built.index(info["simd_level"]) + 1]


def floats(low: float, high: float, step: int) -> np.ndarray:
    """Every `step`-th float32 in [low, high], zero and both ends included."""
    parts = []
    for sign, end in ((-1.0, -low), (1.0, high)):
        if end > 0:
            last = np.float32(min(end, np.finfo(np.float32).max)).view(np.int32)
            bits = np.arange(0, int(last) + 1, step, dtype=np.int32)
            parts.append(np.float32(sign) * np.append(bits, last).view(np.float32))
    x = np.concatenate(parts)
    return np.ascontiguousarray(x[(x >= low) & (x <= high)])


def ulp_error(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """In units of float32's spacing at the exact value; no finer than the smallest normal's."""
    spacing = np.spacing(np.maximum(np.abs(exact), TINY).astype(np.float32)).astype(np.float64)
    error: np.ndarray = np.abs(got.astype(np.float64) - exact) / spacing
    return error


def check(name: str, oracle: Function, low: float, high: float, bound: float, step: int) -> None:
    x = floats(low, high, step)
    x = x[np.abs(x) < 3e38]  # below the last binade's end, where the spacing overflows
    exact = oracle(x.astype(np.float64))
    for level in levels():
        error = ulp_error(_C.math(name, x, level), exact)
        worst = error.argmax()
        assert error[worst] <= bound, (level, x[worst], error[worst])


@pytest.mark.parametrize(("name", "oracle", "low", "high", "bound"), BOUNDS)
def test_bounds(name: str, oracle: Function, low: float, high: float, bound: float) -> None:
    check(name, oracle, low, high, bound, step=1009)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "oracle", "low", "high", "bound"), BOUNDS)
def test_bounds_densely(name: str, oracle: Function, low: float, high: float, bound: float) -> None:
    check(name, oracle, low, high, bound, step=31)


@pytest.mark.parametrize("level", levels())
def test_special_values(level: str) -> None:
    def at(name: str, *x: float) -> list[float]:
        result: list[float] = _C.math(name, np.array(x, np.float32), level).tolist()
        return result

    inf, nan = float("inf"), float("nan")
    for name in ("exp2", "exp", "sigmoid", "silu", "softplus", "softplus_derivative"):
        assert np.isnan(at(name, nan))
    assert at("exp2", inf, 128, 127, 1, 0, -1, -126, -inf) == [
        inf, inf, 2.0**127, 2, 1, 0.5, 2.0**-126, 0,
    ]  # fmt: skip
    assert at("exp", inf, 89, 0, -88, -inf) == [inf, inf, 1, 0, 0]
    assert at("sigmoid", inf, 100, 0, -100, -inf) == [1, 1, 0.5, 0, 0]
    assert at("silu", 100, 0, -100) == [100, 0, 0]
    assert at("softplus", inf, 20.5, -100, -inf) == [inf, 20.5, 0, 0]
    assert at("softplus_derivative", inf, 20.5, -100, -inf) == [1, 1, 0, 0]


@pytest.mark.parametrize("level", levels())
def test_exp2_below_its_range_is_next_to_nothing(level: str) -> None:
    y = _C.math("exp2", floats(-300, -126.00001, 101), level)
    assert (y >= 0).all()
    assert (y <= TINY).all()
