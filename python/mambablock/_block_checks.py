# SPDX-License-Identifier: Apache-2.0
"""What MambaBlock checks before it computes.

Decoding comes here for every token: each check is one fast expression, and names are sought only
where it is false.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import _checks as check
from ._context_parallel import ContextParallel
from ._layers import is_plain_linear
from ._library import accumulator_dtype

if TYPE_CHECKING:
    from .block import MambaBlock, MambaState


def check_sequences(
    block: MambaBlock,
    hidden_states: Tensor,
    state: MambaState | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    context_parallel: ContextParallel | None = None,
) -> None:
    """The arguments of MambaBlock.forward."""
    owner = type(block).__name__
    if context_parallel is not None:
        if not isinstance(context_parallel, ContextParallel):
            raise TypeError(
                f"{owner}: context_parallel must be a ContextParallel; "
                f"got {check.got(context_parallel)}"
            )
        if attention_mask is not None:
            raise ValueError(
                f"{owner}: attention_mask and a ContextParallel must not be given together; "
                "pack sequences by its cu_seqlens"
            )
    check_hidden_states(block, "hidden_states", hidden_states, "batch", "length")
    batch, length, _ = hidden_states.shape
    if attention_mask is not None:
        if cu_seqlens is not None:
            raise ValueError(
                f"{owner}: attention_mask and cu_seqlens must not be given together; "
                "packed sequences have no padding"
            )
        sizes = {"batch": batch, "length": length}
        check.tensor(owner, "attention_mask", attention_mask, sizes, ("batch", "length"))
        if attention_mask.is_floating_point() or attention_mask.is_complex():
            raise ValueError(
                f"{owner}: attention_mask must be bool or integer; got {attention_mask.dtype}"
            )
        check.device(owner, "attention_mask", attention_mask, "hidden_states", hidden_states)
    if cu_seqlens is not None:
        check.tensor(owner, "cu_seqlens", cu_seqlens, {}, ("sequences + 1",))
        if cu_seqlens.numel() == 0:
            raise ValueError(f"{owner}: cu_seqlens must be of at least one value; got (0,)")
        batch = cu_seqlens.shape[0] - 1
    elif context_parallel is not None and context_parallel.cu_seqlens is not None:
        batch = context_parallel.cu_seqlens.shape[0] - 1
    if state is not None:
        _check_state(block, "state", state, batch, hidden_states)


def check_step(block: MambaBlock, hidden_states: Tensor, state: MambaState) -> None:
    """The arguments of MambaBlock.step."""
    check_hidden_states(block, "step's hidden_states", hidden_states, "batch")
    _check_state(block, "step's state", state, hidden_states.shape[0], hidden_states)


def check_hidden_states(
    block: MambaBlock, argument: str, hidden_states: Tensor, *dims: str
) -> None:
    """`dims` are all dimensions but the last."""
    if (
        not isinstance(hidden_states, Tensor)
        or hidden_states.dim() != len(dims) + 1
        or hidden_states.shape[-1] != block.d_model
    ):
        sizes = {"d_model": block.d_model}
        check.tensor(type(block).__name__, argument, hidden_states, sizes, (*dims, "d_model"))
    in_proj = block._modules["in_proj"]  # block.in_proj takes nn.Module ten times as long to find
    assert in_proj is not None
    weight = in_proj._parameters.get("weight")
    if (
        weight is None
        or hidden_states.dtype is not weight.dtype
        or hidden_states.device != weight.device
    ):
        _check_input_of(in_proj, type(block).__name__, argument, hidden_states)


def _check_input_of(layer: nn.Module, owner: str, argument: str, tensor: Tensor) -> None:
    """Type and device, as far as they can be told: an adapter or a quantised layer may convert."""
    if not is_plain_linear(layer) or type(layer.weight) is not nn.Parameter:
        check.floating(owner, argument, tensor)
        return
    check.device(owner, argument, tensor, "the parameters", layer.weight)
    dtype = layer.weight.dtype
    converted = (
        tensor.is_floating_point()
        and torch.float64 not in (tensor.dtype, dtype)
        and check.autocasts(tensor.device.type)
    )
    if tensor.dtype != dtype and not converted:
        raise ValueError(
            f"{owner}: {argument} must be {dtype} as the parameters; got {tensor.dtype}"
        )


def _check_state(
    block: MambaBlock, argument: str, state: MambaState, batch: int, hidden_states: Tensor
) -> None:
    owner = type(block).__name__
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(
            f"{owner}: {argument} must be a MambaState (conv, ssm); got {check.got(state)}"
        )
    conv, ssm = state
    dtype, device = accumulator_dtype(hidden_states.dtype), hidden_states.device
    if (
        isinstance(conv, Tensor)
        and isinstance(ssm, Tensor)
        and conv.shape == (batch, block.d_conv - 1, block.d_inner)
        and ssm.shape == (batch, block.d_inner, block.d_state)
        and conv.dtype is ssm.dtype is dtype
        and conv.device == ssm.device == device
    ):
        return
    sizes = {"batch": batch, "inputs": block.d_conv - 1}
    sizes |= {"d_inner": block.d_inner, "d_state": block.d_state}
    for name, tensor, dims in (
        ("state.conv", conv, ("batch", "inputs", "d_inner")),
        ("state.ssm", ssm, ("batch", "d_inner", "d_state")),
    ):
        check.tensor(owner, name, tensor, sizes, dims)
        if tensor.dtype != dtype:
            raise ValueError(
                f"{owner}: {name} must be {dtype} for hidden_states of {hidden_states.dtype}; "
                f"got {tensor.dtype}"
            )
        check.device(owner, name, tensor, "hidden_states", hidden_states)
