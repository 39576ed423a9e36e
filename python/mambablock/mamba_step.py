# SPDX-License-Identifier: Apache-2.0
"""One decoding step of a whole Mamba block on the CPU: public function and fake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library as library
from ._layers import is_plain_linear
from .linear import MOST_ROWS, has_few_rows

# What it saves between the products makes up for the slowest of them.
MOST_STEPS = dict.fromkeys(MOST_ROWS, 16)


@library.register_fake("mamba_step", "x")
def _fake(a: Any) -> Tensor:
    library.check_shape("mamba_step", "x", a.x, batch=None, d_model=None)
    d_inner, d_model = a.A_log.shape[0], a.x.shape[1]
    shape = {"2 * d_inner": 2 * d_inner, "d_model": d_model}
    library.check_shape("mamba_step", "in_proj_weight", a.in_proj_weight, **shape)
    y: Tensor = a.x.new_empty(a.x.shape)
    return y


_prepare = library.prepared("mamba_step")


def mamba_step(
    conv_state: Tensor,
    ssm_state: Tensor,
    x: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None = None,
    *,
    dt_norm_weight: Tensor | None = None,
    B_norm_weight: Tensor | None = None,
    C_norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One time step of a whole Mamba block (Gu & Dao 2023, arXiv:2312.00752, figure 3) on the CPU,
    for inference; not differentiable. The states advance in place.

    Equivalent to :meth:`mambablock.MambaBlock.step` with these parameters, but for its rounding:
    all between x and y is float32 (float64 for float64), where MambaBlock.forward rounds each
    layer's output to the activations' type. Nothing is kept between calls.

    Args:
        conv_state: (rows, d_conv - 1, d_inner), any of the four floating types and any strides.
        ssm_state: (rows, d_inner, d_state), the same.
        x: (batch, d_model), float32, bfloat16, float16 or float64.
        in_proj_weight: (2 * d_inner, d_model), x's type, as all weights of linear layers.
        in_proj_bias: (2 * d_inner), float32 or x's type, as all parameters below but weights of
            linear layers.
        conv_weight, conv_bias: (d_inner, d_conv) and (d_inner).
        x_proj_weight: (dt_rank + 2 * d_state, d_inner): its rows are dt's, B's and C's.
        dt_proj_weight, dt_proj_bias: (d_inner, dt_rank) and (d_inner).
        A_log, D: (d_inner, d_state), A being -exp(A_log), and (d_inner).
        out_proj_weight, out_proj_bias: (d_model, d_inner) and (d_model).
        dt_norm_weight, B_norm_weight, C_norm_weight: (dt_rank), (d_state) and (d_state): of the
            RMS norms that some models have after x_proj; ones if absent.
        norm_eps: what these norms add to the mean square; None for no norms.
        state_indices: (batch), int32 or int64: each row's row of the states, all distinct; a
            negative one is padding, whose y is 0. Absent, the states have one row per row of x.

    Returns:
        y (batch, d_model), of x's type.

    Raises:
        TypeError: an argument that is no Tensor; the text names it.
        RuntimeError: an argument of a wrong shape, type, device or value; the text names it.
    """
    arguments = _prepare(
        *(conv_state, ssm_state, x, in_proj_weight, in_proj_bias, conv_weight, conv_bias),
        *(x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, out_proj_weight, out_proj_bias),
        *(dt_norm_weight, B_norm_weight, C_norm_weight, norm_eps, state_indices),
    )
    y: Tensor = torch.ops.mambablock.mamba_step(*arguments)
    return y


def can_step(mixer: Any, x: Tensor) -> bool:
    """Whether mamba_step may stand for a step of a mixer with MambaBlock's parameters, whose linear
    layers are then called by nobody."""
    layers = (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    return all(map(is_plain_linear, layers)) and has_few_rows(
        x, *(layer.weight for layer in layers), most=MOST_STEPS
    )


def step_mixer(
    mixer: Any,
    conv_state: Tensor,
    ssm_state: Tensor,
    x: Tensor,
    norm_weights: Sequence[Tensor | None] = (None, None, None),
    norm_eps: float | None = None,
) -> Tensor:
    """mamba_step with the parameters of a mixer for which can_step holds."""
    conv, dt_proj = mixer.conv1d, mixer.dt_proj
    y: Tensor = torch.ops.mambablock.mamba_step(
        *(conv_state, ssm_state, x, mixer.in_proj.weight, mixer.in_proj.bias),
        *(conv.weight.squeeze(1), conv.bias, mixer.x_proj.weight, dt_proj.weight, dt_proj.bias),
        *(mixer.A_log, mixer.D, mixer.out_proj.weight, mixer.out_proj.bias),
        *(*norm_weights, norm_eps, None),
    )
    return y
