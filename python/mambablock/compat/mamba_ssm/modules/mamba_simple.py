# SPDX-License-Identifier: Apache-2.0
"""mamba-ssm's Mamba module (version 2.3): MambaBlock, called as mamba-ssm calls it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks as check
from .._block_checks import check_hidden_states, check_sequences
from .._layers import in_scan_dtype
from ..block import MambaBlock
from ..selective_state_update import selective_state_update
from .causal_conv1d import causal_conv1d_update

__all__ = ["Mamba"]


class Mamba(MambaBlock):
    """mamba-ssm's Mamba module: MambaBlock with its constructor and its way of inference.

    Arguments are MambaBlock's, in mamba-ssm's order; use_fast_path changes nothing.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            d_state,
            d_conv,
            expand,
            dt_rank,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init=dt_init,
            dt_scale=dt_scale,
            dt_init_floor=dt_init_floor,
            conv_bias=conv_bias,
            bias=bias,
            layer_idx=layer_idx,
            device=device,
            dtype=dtype,
        )
        self.expand = expand
        self.use_fast_path = use_fast_path

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:  # type: ignore[override]
        """(batch, seqlen, d_model) to the same.

        inference_params, with seqlen_offset and the dict key_value_memory_dict, keeps the states
        under layer_idx: at offset 0 they are set, and after it hidden_states is one step.

        Raises:
            TypeError, ValueError: as from MambaBlock; or inference_params has not both, layer_idx
                is None, or the states are not as from allocate_inference_cache.
        """
        if inference_params is None:
            y = super().forward(hidden_states)
            assert isinstance(y, Tensor)
            return y
        states = self._states(inference_params, hidden_states)
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, *states)[0]
        y, last = super().forward(hidden_states, return_state=True)
        conv_state, ssm_state = states
        # The state has room for one input more than the convolution needs.
        spare = conv_state.shape[2] - last.conv.shape[1]
        conv_state.copy_(F.pad(last.conv.transpose(1, 2), (spare, 0)))
        ssm_state.copy_(last.ssm)
        return y

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of (batch, 1, d_model); returns (y, conv_state, ssm_state), both updated.

        Raises:
            TypeError, ValueError: an argument is not a tensor, or has a wrong shape, dtype or
                device; the states are then as they were.
        """
        check_hidden_states(self, "step's hidden_states", hidden_states, "batch", "1")
        if hidden_states.shape[1] != 1:
            raise ValueError(
                f"{type(self).__name__}: step's hidden_states must be (batch, 1, d_model); "
                f"got {tuple(hidden_states.shape)}"
            )
        self._check_states(conv_state, ssm_state, hidden_states)
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        x = causal_conv1d_update(
            x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu"
        )
        delta, delta_bias, B, C = self._selection(x)
        y = selective_state_update(
            ssm_state,
            x,
            delta,
            self._A(),
            B,
            C,
            D=in_scan_dtype(self.D),
            z=z,
            delta_bias=delta_bias,
            delta_softplus=True,
        )
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """States of zeros for sequences that start.

        Returns:
            conv_state (batch_size, d_inner, d_conv) and ssm_state (batch_size, d_inner, d_state),
            of dtype or else of conv1d.weight's and dt_proj.weight's.

        Raises:
            TypeError: batch_size is not an integer.
            ValueError: batch_size is negative, or dtype none of the four floating types.
        """
        owner = type(self).__name__
        check.integers(owner, batch_size=batch_size)
        check.not_negative(owner, batch_size=batch_size)
        check.dtype(owner, dtype)
        weight = self.conv1d.weight
        shape = (batch_size, self.d_inner)
        return (
            weight.new_zeros(*shape, self.d_conv, dtype=dtype),
            weight.new_zeros(*shape, self.d_state, dtype=dtype or self.dt_proj.weight.dtype),
        )

    def _states(self, inference_params: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        owner = type(self).__name__
        check_sequences(self, hidden_states, None, None, None)
        if self.layer_idx is None:
            raise ValueError(f"{owner}: layer_idx must be given for inference_params; got None")
        cache = getattr(inference_params, "key_value_memory_dict", None)
        if not isinstance(cache, dict) or not hasattr(inference_params, "seqlen_offset"):
            raise TypeError(
                f"{owner}: inference_params must have seqlen_offset and the dict "
                f"key_value_memory_dict; got {check.got(inference_params)}"
            )
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(hidden_states.shape[0], 0)
        conv_state, ssm_state = cache[self.layer_idx]
        self._check_states(conv_state, ssm_state, hidden_states)
        return conv_state, ssm_state

    def _check_states(self, conv_state: Tensor, ssm_state: Tensor, hidden_states: Tensor) -> None:
        owner = type(self).__name__
        sizes = {"batch": hidden_states.shape[0], "d_inner": self.d_inner, "d_state": self.d_state}
        for name, tensor, dims in (
            ("conv_state", conv_state, ("batch", "d_inner", "state_len")),
            ("ssm_state", ssm_state, ("batch", "d_inner", "d_state")),
        ):
            check.tensor(owner, name, tensor, sizes, dims)
            check.floating(owner, name, tensor)
            check.device(owner, name, tensor, "hidden_states", hidden_states)
        if sizes["state_len"] < self.d_conv - 1:
            raise ValueError(
                f"{owner}: conv_state must hold at least d_conv - 1 = {self.d_conv - 1} inputs; "
                f"got {tuple(conv_state.shape)}"
            )
