# SPDX-License-Identifier: Apache-2.0
"""mamba-ssm's Mamba module (version 2.3): MambaBlock, called as mamba-ssm calls it.

Also as Vision Mamba, VideoMamba and SegMamba extend it, in several directions of time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambablock import _checks as check
from mambablock._block_checks import check_hidden_states, check_sequences
from mambablock._layers import in_scan_dtype
from mambablock.block import MambaBlock
from mambablock.compat._inner import inner
from mambablock.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_update
from mambablock.compat.mamba_ssm.modules import block
from mambablock.selective_state_update import selective_state_update

__all__ = ["Block", "Mamba"]

# The suffixes of the parameters of the directions other than forward.
_directions: dict[str, tuple[str, ...]] = {"none": (), "v1": (), "v2": ("_b",), "v3": ("_b", "_s")}


class Mamba(MambaBlock):
    """mamba-ssm's Mamba module: MambaBlock with its constructor and its way of inference.

    Arguments are MambaBlock's, in mamba-ssm's order; use_fast_path changes nothing. After those of
    mamba-ssm come those of Vision Mamba (Zhu et al. 2024, arXiv:2401.09417) and of its like:

    Args:
        bimamba_type: "none"; "v1", a scan in each direction of one convolution, with parameters
            A_log and A_b_log, and their sum; "v2", the whole in each direction, the reversed one
            with parameters of its own (``_b``); "v3", SegMamba's (arXiv:2401.13560), with a third
            direction (``_s``) that takes the first step of each slice, then the second, and so on.
        if_divide_out: halve the sum of v2.
        init_layer_scale: if given, the output is scaled by a parameter gamma that starts with it.
        bimamba: VideoMamba's (arXiv:2403.06977) name of "v2" (True) and "none" (False).
        nslices: of "v3"; the length must be a multiple.
    """

    # What models lack that mamba-ssm pickled.
    recompute = False
    bimamba_type = "none"
    if_divide_out = False
    init_layer_scale: float | None = None
    nslices = 5
    _name = "mamba_block"
    dt_min, dt_max, dt_init, dt_scale, dt_init_floor = 0.001, 0.1, "random", 1.0, 1e-4

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
        bimamba_type: str = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        bimamba: bool | None = None,
        nslices: int = 5,
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
        self.activation = "silu"
        self.act = nn.SiLU()
        if bimamba is not None:
            bimamba_type = "v2" if bimamba else "none"
        if bimamba_type not in _directions:
            owner, known = type(self).__name__, ", ".join(map(repr, _directions))
            raise ValueError(f"{owner}: bimamba_type must be one of {known}; got {bimamba_type!r}")
        self.bimamba_type = bimamba_type
        self.if_divide_out = if_divide_out
        self.nslices = nslices
        self.init_layer_scale = init_layer_scale
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), init_layer_scale, **options))
        if bimamba_type == "v1":
            self.A_b_log = self._copy_of(self.A_log)
        for suffix in _directions[bimamba_type]:
            self._add_direction(suffix, options)

    def _add_direction(self, suffix: str, options: dict[str, Any]) -> None:
        conv, x_proj, dt_proj = self.conv1d, self.x_proj, self.dt_proj
        setattr(self, f"A{suffix}_log", self._copy_of(self.A_log))
        new_conv = nn.Conv1d(
            *(conv.in_channels, conv.out_channels, self.d_conv),
            groups=conv.groups,
            padding=self.d_conv - 1,
            bias=conv.bias is not None,
            **options,
        )
        setattr(self, f"conv1d{suffix}", new_conv)
        x_sizes, dt_sizes = (x_proj.in_features, x_proj.out_features), (self.dt_rank, self.d_inner)
        setattr(self, f"x_proj{suffix}", nn.Linear(*x_sizes, bias=False, **options))
        setattr(
            self, f"dt_proj{suffix}", nn.Linear(*dt_sizes, bias=dt_proj.bias is not None, **options)
        )
        setattr(self, f"D{suffix}", self._copy_of(self.D))

    @staticmethod
    def _copy_of(parameter: Tensor) -> nn.Parameter:
        """A parameter that starts as A_log or D does, and is kept from weight decay as they are."""
        copy = nn.Parameter(parameter.detach().clone())
        copy._no_weight_decay = True  # type: ignore[attr-defined]
        return copy

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:  # type: ignore[override]
        """(batch, seqlen, d_model) to the same.

        inference_params, with seqlen_offset and the dict key_value_memory_dict, keeps the states
        under layer_idx: at offset 0 they are set, and after it hidden_states is one step.

        Raises:
            TypeError, ValueError: as from MambaBlock; or inference_params has not both, layer_idx
                is None, or the states are not as from allocate_inference_cache.
        """
        if self.bimamba_type != "none" or self.init_layer_scale is not None:
            return self._in_directions(hidden_states, inference_params)
        if inference_params is None:
            y = super().forward(hidden_states)
            assert isinstance(y, Tensor)
            return y
        check_sequences(self, hidden_states, None, None, None)
        states = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        self._check_states(*states, hidden_states)
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, *states)[0]
        y, last = super().forward(hidden_states, return_state=True)
        conv_state, ssm_state = states
        # The state has room for one input more than the convolution needs.
        spare = conv_state.shape[2] - last.conv.shape[1]
        conv_state.copy_(F.pad(last.conv.transpose(1, 2), (spare, 0)))
        ssm_state.copy_(last.ssm)
        return y

    def _in_directions(self, hidden_states: Tensor, inference_params: Any) -> Tensor:
        owner = type(self).__name__
        if inference_params is not None:
            raise ValueError(
                f"{owner}: inference_params must be None with bimamba_type or init_layer_scale; "
                f"got {check.got(inference_params)}"
            )
        check_hidden_states(self, "hidden_states", hidden_states, "batch", "length")
        xz = self.in_proj(hidden_states).transpose(1, 2)
        if self.bimamba_type == "v1":
            scans = [(self._A(), False), (self._A("_b"), True)]
            y = self._mixed("", xz, scans)
        else:
            y = self._mixed("", xz)
            if self.bimamba_type != "none":
                y = y + self._mixed("_b", xz, reverse=True)
            if self.bimamba_type == "v3":
                y = y + self._over_slices(xz)
            if self.if_divide_out:
                y = y / 2
        out: Tensor = self.out_proj(y)
        return out if self.init_layer_scale is None else out * self.gamma

    def _mixed(
        self,
        suffix: str,
        xz: Tensor,
        scans: list[tuple[Tensor, bool]] | None = None,
        reverse: bool = False,
    ) -> Tensor:
        """The gated scan, (batch, length, d_inner), with one direction's parameters."""
        conv, x_proj = getattr(self, f"conv1d{suffix}"), getattr(self, f"x_proj{suffix}")
        dt_proj, D = getattr(self, f"dt_proj{suffix}"), getattr(self, f"D{suffix}")
        return inner(
            type(self).__name__,
            *(xz, conv.weight, conv.bias, x_proj.weight, dt_proj.weight),
            *(scans or [(self._A(suffix), reverse)], None, None, D, dt_proj.bias),
            checkpoint_lvl=int(torch.is_grad_enabled()),
            reverse=reverse,
        )

    def _over_slices(self, xz: Tensor) -> Tensor:
        slices, length = self.nslices, xz.shape[2]
        if length % slices:
            raise ValueError(
                f"{type(self).__name__}: hidden_states must be of a length that nslices={slices} "
                f"divides; got {length}"
            )
        xz = xz.unflatten(2, (slices, -1)).transpose(2, 3).flatten(2)
        y = self._mixed("_s", xz)
        sliced: Tensor = y.unflatten(1, (-1, slices))
        return sliced.transpose(1, 2).flatten(1, 2)

    def _A(self, suffix: str = "") -> Tensor:
        return -torch.exp(in_scan_dtype(getattr(self, f"A{suffix}_log")))

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
        x, delta, delta_bias, B, C = self._selection(x)
        y = selective_state_update(
            ssm_state,
            x,
            delta,
            self.A_log,
            B,
            C,
            D=self.D,
            z=z,
            delta_bias=delta_bias,
            delta_softplus=True,
            A_is_log=True,
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

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The states under layer_idx, allocated if there are none, set to 0 if initialize_states.

        Raises:
            ValueError: layer_idx is None.
            TypeError: inference_params has no dict key_value_memory_dict, or no seqlen_offset.
        """
        owner = type(self).__name__
        if self.layer_idx is None:
            raise ValueError(f"{owner}: layer_idx must be given for inference_params; got None")
        cache = getattr(inference_params, "key_value_memory_dict", None)
        if not isinstance(cache, dict) or not hasattr(inference_params, "seqlen_offset"):
            raise TypeError(
                f"{owner}: inference_params must have seqlen_offset and the dict "
                f"key_value_memory_dict; got {check.got(inference_params)}"
            )
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        conv_state, ssm_state = cache[self.layer_idx]
        if initialize_states:
            conv_state.zero_()
            ssm_state.zero_()
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


class Block(block.Block):
    """mamba-ssm's Block as it was before version 2, without an MLP."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)
