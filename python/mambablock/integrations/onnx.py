# SPDX-License-Identifier: Apache-2.0
"""Translations of the operators to ONNX, for torch.onnx.export(dynamo=True)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import FLOAT, graph, opset18, script
from torch import Tensor, nn

from .. import _library  # noqa: F401  (loads the operators)

__all__ = ["WithStates", "translations"]

op: Any = opset18
_last = 2**62


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What torch.onnx.export takes as custom_translation_table.

    causal_conv1d becomes a Conv over the state and the inputs, selective_scan a Scan over time with
    a state of the operator's; batch and length may be dynamic. They compute in float32.
    `cu_seqlens` and the in-place steps have no translation: a step is a forward of length 1 with
    states in and out.
    """
    ops = torch.ops.mambablock
    return {
        ops.causal_conv1d.default: _causal_conv1d,
        ops.selective_scan.default: _selective_scan,
    }


class WithStates(nn.Module):
    """A patched Mamba or FalconMamba model of transformers, with its states in and out.

    forward(input_ids, conv_states, ssm_states) gives (logits, conv_states, ssm_states) of
    (layers, batch, d_inner, d_conv) and (layers, batch, d_inner, d_state): zeros for sequences that
    start. One exported program, of dynamic length, is both prefill and decoding.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def initial_states(self, batch: int) -> tuple[Tensor, Tensor]:
        """States of zeros."""
        config, weight = self.model.config, next(self.model.parameters())
        shape = (config.num_hidden_layers, batch, config.intermediate_size)
        return (
            weight.new_zeros(*shape, config.conv_kernel),
            weight.new_zeros(*shape, config.state_size, dtype=torch.float32),
        )

    def forward(
        self, input_ids: Tensor, conv_states: Tensor, ssm_states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        from transformers.cache_utils import DynamicCache

        cache: Any = DynamicCache(config=self.model.config)
        for i, layer in enumerate(cache.layers):
            layer.update_conv_state(conv_states[i])
            layer.update_recurrent_state(ssm_states[i])
        logits = self.model(input_ids, cache=cache, use_cache=True).logits
        return (
            logits,
            torch.stack([layer.conv_states[0] for layer in cache.layers]),
            torch.stack([layer.recurrent_states[0] for layer in cache.layers]),
        )


def _causal_conv1d(
    x: Any,
    weight: Any,
    bias: Any = None,
    initial_state: Any = None,
    cu_seqlens: Any = None,
    silu: bool = False,
    reverse: bool = False,
) -> Any:
    _forbid_sequences("causal_conv1d", cu_seqlens)
    channels, width = weight.shape
    inputs = _float(_reversed(x, reverse))
    past = _zeros(inputs, [width - 1, channels]) if initial_state is None else initial_state
    inputs = op.Concat(past, inputs, axis=1)
    kernel = op.Unsqueeze(_float(weight), _ints(1))
    y = op.Conv(op.Transpose(inputs, perm=[0, 2, 1]), kernel, group=channels)
    y = op.Transpose(y, perm=[0, 2, 1])
    if bias is not None:
        y = op.Add(y, _float(bias))
    if silu:
        y = op.Mul(y, op.Sigmoid(y))
    begin = -(width - 1) if width > 1 else _last
    final_state = op.Slice(inputs, _ints(begin), _ints(_last), _ints(1))
    return op.CastLike(_reversed(y, reverse), x), final_state


def _selective_scan(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    initial_state: Any = None,
    cu_seqlens: Any = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    save_states: bool = False,
) -> Any:
    _forbid_sequences("selective_scan", cu_seqlens)
    channels, states = A.shape
    inputs, dt = _float(u), _float(delta)
    if delta_bias is not None:
        dt = op.Add(dt, _float(delta_bias))
    if delta_softplus:
        dt = op.Softplus(dt)
    per_step = [_of_channels(t, channels) for t in (B, C)]
    ordered = [_reversed(t, reverse) for t in (inputs, dt, *per_step)]
    h = _zeros(inputs, [channels, states]) if initial_state is None else initial_state
    final_state, y = _scan(h, _float(A), *ordered)
    y = _reversed(y, reverse)
    if D is not None:
        y = op.Add(y, op.Mul(_float(D), inputs))
    if z is not None:
        gate = _float(z)
        y = op.Mul(y, op.Mul(gate, op.Sigmoid(gate)))
    saved_states = op.ConstantOfShape(_ints(0))
    return op.CastLike(y, u), final_state, saved_states


@script()
def _scan(h: FLOAT, A: FLOAT, u: FLOAT, dt: FLOAT, B: FLOAT, C: FLOAT) -> tuple[FLOAT, FLOAT]:
    """The recurrence: h (batch, d_inner, d_state), the rest with time as their second dimension."""

    @graph()
    def step(h, A, u, dt, B, C):  # type: ignore[no-untyped-def]
        last = op.Constant(value_ints=[-1])
        decay = op.Exp(op.Mul(op.Unsqueeze(dt, last), A))
        added = op.Mul(op.Unsqueeze(op.Mul(dt, u), last), B)
        h_next = op.Add(op.Mul(decay, h), added)
        y = op.ReduceSum(op.Mul(h_next, C), last, keepdims=0)
        return h_next, op.Identity(A), y

    final_state, _same_A, y = op.Scan(
        h,
        A,
        u,
        dt,
        B,
        C,
        body=step,
        num_scan_inputs=4,
        scan_input_axes=[1, 1, 1, 1],
        scan_output_axes=[1],
    )
    return final_state, y


def _of_channels(tensor: Any, channels: int) -> Any:
    """B or C as (batch, length, 1 or d_inner, d_state)."""
    if len(tensor.shape) == 3:
        return op.Unsqueeze(_float(tensor), _ints(2))
    groups, states = tensor.shape[2:]
    runs = op.Expand(op.Unsqueeze(_float(tensor), _ints(3)), _ints(1, 1, 1, channels // groups, 1))
    return op.Reshape(runs, _ints(0, 0, channels, states))


def _zeros(inputs: Any, sizes: list[int]) -> Any:
    """(batch, *sizes)."""
    batch = op.Shape(inputs, start=0, end=1)
    return op.ConstantOfShape(op.Concat(batch, _ints(*sizes), axis=0))


def _reversed(tensor: Any, reverse: bool) -> Any:
    if not reverse:
        return tensor
    return op.Slice(tensor, _ints(-1), _ints(-_last), _ints(1), _ints(-1))


def _float(tensor: Any) -> Any:
    return op.Cast(tensor, to=1)


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _forbid_sequences(operator: str, cu_seqlens: Any) -> None:
    if cu_seqlens is not None:
        raise NotImplementedError(
            f"{operator}: cu_seqlens must be None for ONNX, which has no packed sequences; got a "
            "tensor"
        )
