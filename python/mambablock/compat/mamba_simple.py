# SPDX-License-Identifier: Apache-2.0
"""mamba-ssm's Mamba module (version 2.3): MambaBlock, called as mamba-ssm calls it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
        """
        if inference_params is None:
            y = super().forward(hidden_states)
            assert isinstance(y, Tensor)
            return y
        states = self._states(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, *states)[0]
        y, last = super().forward(hidden_states, return_state=True)
        conv_state, ssm_state = states
        # The state has room for one input more than the convolution looks back to.
        conv_state.copy_(F.pad(last.conv.transpose(1, 2), (1, 0)))
        ssm_state.copy_(last.ssm)
        return y

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of (batch, 1, d_model); returns (y, conv_state, ssm_state), both updated.

        Raises:
            ValueError: hidden_states has another number of steps than one.
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(
                "Mamba: step's hidden_states must be (batch, 1, d_model); "
                f"got {tuple(hidden_states.shape)}"
            )
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
        """
        weight = self.conv1d.weight
        shape = (batch_size, self.d_inner)
        return (
            weight.new_zeros(*shape, self.d_conv, dtype=dtype),
            weight.new_zeros(*shape, self.d_state, dtype=dtype or self.dt_proj.weight.dtype),
        )

    def _states(self, inference_params: Any, batch: int) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError("Mamba: layer_idx must be given for inference_params; got None")
        cache: dict[int, tuple[Tensor, Tensor]] = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch, 0)
        return cache[self.layer_idx]
