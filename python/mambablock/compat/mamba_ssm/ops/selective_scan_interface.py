# SPDX-License-Identifier: Apache-2.0
"""mamba-ssm's Mamba-1 functions (version 2.3) on mambablock's operators, with Vision Mamba's.

Sequences are (batch, dim, seqlen), in any memory layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mambablock import _checks as check
from mambablock import reference
from mambablock.compat._explain import Forms, Parameters, Result, explained
from mambablock.compat._inner import Norms, inner, out_proj
from mambablock.compat._scan import per_time_forms, scan

__all__ = [
    "MambaInnerFn",
    "SelectiveScanFn",
    "bimamba_inner_fn",
    "bimamba_inner_ref",
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "mamba_inner_ref",
    "selective_scan_fn",
    "selective_scan_ref",
]


def _scan_forms(
    A: Any = None, B: Any = None, C: Any = None, **_: Any
) -> dict[str, str | tuple[str, ...]]:
    return {
        "A": "dim, dstate",
        "A_b": "dim, dstate",
        "u": "batch, dim, seqlen",
        "delta": "batch, dim, seqlen",
        "B": per_time_forms(A, B),
        "C": per_time_forms(A, C),
        "D": "dim",
        "z": "batch, dim, seqlen",
        "delta_bias": "dim",
    }


def _inner_forms(A: Any = None, B: Any = None, C: Any = None, **_: Any) -> Forms:
    states = "2 * dstate" if isinstance(A, Tensor) and A.is_complex() else "dstate"
    return {
        "conv1d_weight": "dim, 1, width",
        "conv1d_bias": "dim",
        "xz": "batch, 2 * dim, seqlen",
        "delta_proj_weight": "dim, dt_rank",
        "x_proj_weight": "rows, dim",
        "out_proj_weight": "d_model, dim",
        "out_proj_bias": "d_model",
        **_scan_forms(A, B, C),
        "B_proj_bias": states,
        "C_proj_bias": states,
        "b_rms_weight": "dstate",
        "c_rms_weight": "dstate",
        "dt_rms_weight": "dim",
    }


_complex = ("A", "B", "C")


def _explained_inner(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    return explained(
        *(_inner_forms, (), _complex), x="xz", weight="conv1d_weight", bias="conv1d_bias"
    )(function)


@explained(_scan_forms, may_be_complex=_complex)
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan (Gu & Dao 2023, arXiv:2312.00752, algorithm 2).

    Args:
        u, delta: (batch, dim, seqlen).
        A: (dim, dstate), real, or complex: then by a plain loop over time, and h stands for a
            conjugate pair of states. B and C are complex too, or real of twice the seqlen, with
            real and imaginary parts in turn.
        B, C: (batch, dstate, seqlen), (batch, groups, dstate, seqlen), or constant in time:
            (dim, dstate), whose gradient takes memory for every step.
        D: (dim).
        z: (batch, dim, seqlen): the gate.
        delta_bias: (dim).
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the state after the last step.

    Returns:
        The output, of u's shape and type, or (output, last state (batch, dim, dstate) in float32
        or A's complex type).
        Both are differentiable, the state too.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument has a wrong shape, dtype or device.
        RuntimeError: as from :func:`mambablock.selective_scan`.
    """
    check.floating("selective_scan_fn", "u", u)
    y, last_state = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (y, last_state) if return_last_state else y


@explained(_scan_forms, may_be_complex=_complex)
def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """selective_scan_fn by its definition, in plain PyTorch."""
    check.floating("selective_scan_ref", "u", u)
    y, last_state = scan(
        *(u, delta, A, B, C, D, z, delta_bias, delta_softplus), operator=reference.selective_scan
    )
    return (y, last_state) if return_last_state else y


@_explained_inner
def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """The Mamba block after its input projection.

    Args:
        xz: (batch, 2 * dim, seqlen), x first.
        conv1d_weight: (dim, 1, width).
        conv1d_bias: (dim).
        x_proj_weight: (dt_rank + 2 * dstate, dim), in the order delta, B, C; with a complex A of
            4 * dstate, where B's and C's are real and imaginary parts in turn.
        delta_proj_weight: (dim, dt_rank).
        out_proj_weight: (d_model, dim).
        out_proj_bias: (d_model).
        A, B, C, D, delta_bias, delta_softplus: as in selective_scan_fn; B or C, if absent, comes
            from x_proj.
        B_proj_bias, C_proj_bias: (dstate), added to a B or C from x_proj.
        checkpoint_lvl: 1 recomputes the convolution and delta in the backward, 0 saves them.
        b_rms_weight, c_rms_weight: (dstate), of an RMS norm of B and C.
        dt_rms_weight: (dim), of an RMS norm of delta, before its bias.
        b_c_dt_rms_eps: these norms' epsilon.

    Returns:
        (batch, seqlen, d_model).

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument has a wrong shape, dtype or device, or another checkpoint_lvl.
        RuntimeError: as from :func:`mambablock.selective_scan`.
    """
    norms = Norms(b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps)
    y = inner(
        *(
            "mamba_inner_fn",
            xz,
            conv1d_weight,
            conv1d_bias,
            x_proj_weight,
            delta_proj_weight,
            [(A, False)],
            B,
            C,
            D,
            delta_bias,
            B_proj_bias,
            C_proj_bias,
            delta_softplus,
        ),
        checkpoint_lvl=checkpoint_lvl,
        norms=norms,
        out_proj_weight=out_proj_weight,
    )
    return out_proj(y, out_proj_weight, out_proj_bias)


@_explained_inner
def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """mamba_inner_fn by its definition, in plain PyTorch."""
    y = inner(
        *(
            "mamba_inner_ref",
            xz,
            conv1d_weight,
            conv1d_bias,
            x_proj_weight,
            delta_proj_weight,
            [(A, False)],
            B,
            C,
            D,
            delta_bias,
            B_proj_bias,
            C_proj_bias,
            delta_softplus,
        ),
        plain=True,
        out_proj_weight=out_proj_weight,
    )
    return out_proj(y, out_proj_weight, out_proj_bias)


@_explained_inner
def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """mamba_inner_fn without its output projection: (batch, dim, seqlen). Of Vision Mamba."""
    return inner(
        *(
            "mamba_inner_fn_no_out_proj",
            xz,
            conv1d_weight,
            conv1d_bias,
            x_proj_weight,
            delta_proj_weight,
            [(A, False)],
            B,
            C,
            D,
            delta_bias,
            B_proj_bias,
            C_proj_bias,
            delta_softplus,
        ),
    ).transpose(1, 2)


@_explained_inner
def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """mamba_inner_fn with the scan in both directions, the reversed one with A_b, and their sum.

    Of Vision Mamba (Zhu et al. 2024, arXiv:2401.09417), as its bimamba_type "v1".
    """
    y = inner(
        *(
            "bimamba_inner_fn",
            xz,
            conv1d_weight,
            conv1d_bias,
            x_proj_weight,
            delta_proj_weight,
            [(A, False), (A_b, True)],
            B,
            C,
            D,
            delta_bias,
            B_proj_bias,
            C_proj_bias,
            delta_softplus,
        ),
        out_proj_weight=out_proj_weight,
    )
    return out_proj(y, out_proj_weight, out_proj_bias)


@_explained_inner
def bimamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """bimamba_inner_fn by its definition, in plain PyTorch."""
    y = inner(
        *(
            "bimamba_inner_ref",
            xz,
            conv1d_weight,
            conv1d_bias,
            x_proj_weight,
            delta_proj_weight,
            [(A, False), (A_b, True)],
            B,
            C,
            D,
            delta_bias,
            B_proj_bias,
            C_proj_bias,
            delta_softplus,
        ),
        plain=True,
        out_proj_weight=out_proj_weight,
    )
    return out_proj(y, out_proj_weight, out_proj_bias)


class SelectiveScanFn:
    """For callers of mamba-ssm's autograd.Function by its name."""

    apply = staticmethod(selective_scan_fn)


class MambaInnerFn:
    """For callers of mamba-ssm's autograd.Function by its name."""

    apply = staticmethod(mamba_inner_fn)
