# SPDX-License-Identifier: Apache-2.0
"""mamba-ssm's residual block around a mixer (version 2.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mambablock.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn

__all__ = ["Block"]


class Block(nn.Module):
    """Add, norm, mix: the residual is added before the norm, and both branches are returned.

    With an MLP, the same again around it.

    Args:
        dim: of the hidden states.
        mixer_cls, mlp_cls, norm_cls: make a layer of dim; nn.Identity as mlp_cls is none.
        fused_add_norm: add and norm by one function; needs LayerNorm or RMSNorm.
        residual_in_fp32: keep the residual in float32.

    Raises:
        TypeError: fused_add_norm with another norm.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp: nn.Module | None = mlp_cls(dim)
        else:
            self.mlp = None
        if fused_add_norm and not isinstance(self.norm, (nn.LayerNorm, RMSNorm)):
            raise TypeError(
                f"{type(self).__name__}: norm_cls must make a LayerNorm or RMSNorm with "
                f"fused_add_norm; got {type(self.norm).__name__}"
            )

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: Any = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """The hidden states after mixer (and MLP), and the residual to be added to them."""
        hidden_states, residual = self._add_norm(self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        # A model that was pickled by mamba-ssm before version 2 has no mlp.
        if self._modules.get("mlp") is not None:
            hidden_states, residual = self._add_norm(self.norm2, hidden_states, residual)
            assert self.mlp is not None
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _add_norm(
        self, norm: Any, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.fused_add_norm:
            outputs: Any = layer_norm_fn(
                hidden_states,
                norm.weight,
                norm.bias,
                residual=residual,
                eps=norm.eps,
                prenorm=True,
                residual_in_fp32=self.residual_in_fp32,
                is_rms_norm=isinstance(norm, RMSNorm),
            )
            return outputs[0], outputs[1]
        residual = hidden_states if residual is None else hidden_states + residual
        normed = norm(residual.to(norm.weight.dtype))
        return normed, residual.float() if self.residual_in_fp32 else residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The mixer's."""
        mixer: Any = self.mixer
        return mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
