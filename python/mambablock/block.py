# SPDX-License-Identifier: Apache-2.0
"""The Mamba block as a PyTorch module, with mamba-ssm's parameter names."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _checks as check
from ._block_checks import check_sequences, check_step
from ._context_parallel import ContextParallel
from ._layers import project_delta, project_inputs, recomputed_but_scan
from ._library import accumulator_dtype
from ._padding import last_real_inputs, padding_last, take_steps
from .causal_conv1d import causal_conv1d
from .causal_conv1d_update import causal_conv1d_update
from .mamba_step import can_step, step_mixer
from .selective_scan import selective_scan
from .selective_state_update import selective_state_update

__all__ = ["MambaBlock", "MambaState"]


class MambaState(NamedTuple):
    """What a block carries from one piece of its sequences to the next.

    Both are float32 (float64 for a float64 block), one row per sequence.
    """

    conv: Tensor
    """The last d_conv - 1 inputs of the convolution, oldest first: (batch, d_conv - 1, d_inner)."""
    ssm: Tensor
    """The recurrence's h: (batch, d_inner, d_state)."""


class MambaBlock(nn.Module):
    """The Mamba-1 block: in_proj -> causal conv1d + SiLU -> selective scan -> gate -> out_proj.

    Source: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    arXiv:2312.00752, section 3.4 and figure 3; the initial values are those of section 3.6. The
    state_dict's keys and shapes are those of mamba-ssm's `Mamba` and transformers' `MambaMixer`.

    Args:
        d_model: width of the input and the output.
        d_state: state size N of each channel.
        d_conv: width of the causal convolution, in time steps.
        expand: d_inner = int(expand * d_model), unless d_inner is given.
        dt_rank: rank of the projection that makes delta; "auto" is ceil(d_model / 16).
        d_inner: number of channels of the convolution and the scan.
        dt_min, dt_max: softplus(dt_proj.bias) starts log-uniform between them.
        dt_init: dt_proj.weight starts "random" (uniform) or "constant".
        dt_scale: dt_proj.weight starts within +-dt_scale * dt_rank^-0.5.
        dt_init_floor: least starting value of softplus(dt_proj.bias).
        conv_bias: whether the convolution has a bias.
        bias: whether in_proj and out_proj have one.
        recompute: for training, save neither the convolution's output nor delta for the backward,
            which recomputes them from in_proj's output; the scan itself is not run again.
        layer_idx: the block's place in a model, for the caller's own use.
        device, dtype: of the parameters; A_log and D are float32 (float64 for float64) whatever
            dtype is.

    Raises:
        TypeError: a size or layer_idx is not an integer, expand or a dt_ value not a number, a flag
            not a bool.
        ValueError: a number is not positive and finite (dt_scale may be 0), dt_max is less than
            dt_min, dt_rank or dt_init is an unknown word, or dtype is not one of float32, bfloat16,
            float16 and float64.
    """

    op_type = "MambaBlock"

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        *,
        d_inner: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        recompute: bool = False,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check.integers(owner, d_model=d_model, d_state=d_state, d_conv=d_conv)
        check.numbers(owner, expand=expand, dt_min=dt_min, dt_max=dt_max)
        check.numbers(owner, dt_scale=dt_scale, dt_init_floor=dt_init_floor)
        check.positive(owner, d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        check.positive(owner, dt_min=dt_min, dt_max=dt_max, dt_init_floor=dt_init_floor)
        check.not_negative(owner, dt_scale=dt_scale)
        check.flags(owner, conv_bias=conv_bias, bias=bias, recompute=recompute)
        check.dtype(owner, dtype)
        if dt_max < dt_min:
            raise ValueError(f"{owner}: dt_max must be at least dt_min={dt_min}; got {dt_max}")
        if dt_init not in ("random", "constant"):
            raise ValueError(f"{owner}: dt_init must be 'random' or 'constant'; got {dt_init!r}")
        if dt_rank == "auto":
            dt_rank = math.ceil(d_model / 16)
        elif isinstance(dt_rank, str):
            raise ValueError(f"{owner}: dt_rank must be 'auto' or an integer; got {dt_rank!r}")
        if d_inner is None:
            d_inner = int(expand * d_model)
        check.integers(owner, dt_rank=dt_rank, d_inner=d_inner)
        check.positive(owner, dt_rank=dt_rank, d_inner=d_inner)
        if layer_idx is not None:
            check.integers(owner, layer_idx=layer_idx)

        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.d_inner = d_inner
        self.dt_rank = dt_rank
        self.dt_min = dt_min
        self.dt_max = dt_max
        self.dt_init = dt_init
        self.dt_scale = dt_scale
        self.dt_init_floor = dt_init_floor
        self.recompute = recompute
        self.layer_idx = layer_idx
        self.name = "mamba_block"

        dtype = dtype or torch.get_default_dtype()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        scan_options: dict[str, Any] = {"device": device, "dtype": accumulator_dtype(dtype)}
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias, **options)
        # Only holds the parameters, under the names that checkpoints have: the op computes.
        self.conv1d = nn.Conv1d(
            d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1, bias=conv_bias, **options
        )
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False, **options)
        self.dt_proj = nn.Linear(dt_rank, d_inner, **options)
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state, **scan_options))
        self.D = nn.Parameter(torch.empty(d_inner, **scan_options))
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, **options)
        self._reset_scan_parameters()

    def reset_parameters(self) -> None:
        """Draw all initial values again, as after construction on meta and to_empty()."""
        for layer in (self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj):
            layer.reset_parameters()
        self._reset_scan_parameters()

    @torch.no_grad()
    def _reset_scan_parameters(self) -> None:
        """A_log = log(1..N) (S4D-Real), D = 1, and dt_proj such that delta starts in its range."""
        bound = self.dt_scale * self.dt_rank**-0.5
        if self.dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        else:
            nn.init.constant_(self.dt_proj.weight, bound)

        dt = torch.empty_like(self.D).uniform_(math.log(self.dt_min), math.log(self.dt_max)).exp()
        dt = dt.clamp(min=self.dt_init_floor)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log.copy_(torch.ones_like(self.A_log).cumsum(1).log())
        self.D.fill_(1.0)

        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        self._mark_parameters()

    def _mark_parameters(self) -> None:
        """Mark what training code that knows mamba-ssm keeps from weight decay."""
        self.A_log._no_weight_decay = True  # type: ignore[attr-defined]
        self.D._no_weight_decay = True  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark_parameters()  # which copy.deepcopy drops from parameters

    def forward(
        self,
        hidden_states: Tensor,
        state: MambaState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        reverse: bool = False,
        return_state: bool = False,
        context_parallel: ContextParallel | None = None,
    ) -> Tensor | tuple[Tensor, MambaState]:
        """Run the block over whole sequences, or over the next piece of each.

        Args:
            hidden_states: (batch, length, d_model), of the parameters' type.
            state: what an earlier piece returned, or any pair (conv, ssm) like it; left as it is.
                None is a state of zeros.
            attention_mask: (batch, length), bool or integer, nonzero where a token is real. Each
                row gives what its real tokens would give alone, wherever the padding lies; outputs
                at padding are 0.
            cu_seqlens: (sequences + 1), int32 or int64: hidden_states is one row (batch = 1) in
                which sequence s takes the time steps cu_seqlens[s] to cu_seqlens[s + 1]. States
                then have a row per sequence.
            reverse: run backward in time, within each sequence, as if its real tokens were flipped
                before and after; nothing is.
            return_state: also return the state after each row's (sequence's) last real token.
            context_parallel: hidden_states is a shard along length, as it describes; it also has
                cu_seqlens, and states are those of whole rows (sequences). See
                :class:`mambablock.distributed.ContextParallel`.

        Returns:
            y (batch, length, d_model), or (y, MambaState). Gradients flow through both states.

        Raises:
            TypeError: an argument is not a tensor, or state not a pair of tensors.
            ValueError: an argument has a wrong shape, dtype or device, or attention_mask and
                cu_seqlens are given together.
            RuntimeError: cu_seqlens is not what :func:`mambablock.selective_scan` takes.
        """
        check_sequences(self, hidden_states, state, attention_mask, cu_seqlens, context_parallel)
        conv_state, ssm_state = (None, None) if state is None else state
        padding = None
        if attention_mask is not None:
            order, padding = padding_last(attention_mask, reverse)
            hidden_states = take_steps(hidden_states, order).masked_fill(padding, 0)

        inputs, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        args = (inputs, z, conv_state, ssm_state, padding, cu_seqlens, reverse)
        mix = partial(self._mix, context_parallel=context_parallel, return_state=return_state)
        if self.recompute and torch.is_grad_enabled():
            y, last_inputs, last_h = recomputed_but_scan(mix, *args)
        else:
            y, last_inputs, last_h = mix(*args)
        y = self.out_proj(y)

        if padding is not None:
            y = take_steps(y.masked_fill(padding, 0), order.argsort(dim=1))
            if return_state:
                last_inputs = last_real_inputs(
                    conv_state, inputs, padding, reverse, self.d_conv - 1
                )
        if not return_state:
            return y
        assert last_inputs is not None
        assert last_h is not None
        return y, MambaState(last_inputs, last_h)

    def _mix(
        self,
        inputs: Tensor,
        z: Tensor,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        padding: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
        *,
        context_parallel: ContextParallel | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """All between in_proj and out_proj: y, the last inputs and h; padding comes last in the
        direction of time."""
        shared: dict[str, Any] = {"cu_seqlens": cu_seqlens, "reverse": reverse}
        # A state that nobody asked for is not exchanged.
        shared["return_final_state"] = return_state
        if context_parallel is not None:
            shared["context_parallel"] = context_parallel
        convolved = causal_conv1d(
            inputs,
            self.conv1d.weight.squeeze(1),
            bias=self.conv1d.bias,
            silu=True,
            initial_state=conv_state,
            **shared,
        )
        x, last_inputs = convolved if isinstance(convolved, tuple) else (convolved, None)
        x, delta, delta_bias, B, C = self._selection(x)
        if padding is not None:
            # softplus(-inf) = 0: padding takes a step of no length, so the state passes unchanged.
            delta = delta.masked_fill(padding, -math.inf)
        scanned = selective_scan(
            x,
            delta,
            self.A_log,
            B,
            C,
            D=self.D,
            z=z,
            delta_bias=delta_bias,
            delta_softplus=True,
            initial_state=ssm_state,
            A_is_log=True,
            **shared,
        )
        y, last_h = scanned if isinstance(scanned, tuple) else (scanned, None)
        return y, last_inputs, last_h

    @torch.no_grad()
    def step(self, hidden_states: Tensor, state: MambaState) -> Tensor:
        """One time step of forward, for inference: no gradients, the state advanced in place.

        Args:
            hidden_states: (batch, d_model), of the parameters' type.
            state: from allocate_state, forward or an earlier step.

        Returns:
            y (batch, d_model).

        Raises:
            TypeError: hidden_states is not a tensor, or state not a pair of tensors.
            ValueError: hidden_states or state has a wrong shape, dtype or device; the state is then
                as it was.
        """
        check_step(self, hidden_states, state)
        conv_state, ssm_state = state
        if can_step(self, hidden_states):
            return step_mixer(self, conv_state, ssm_state, hidden_states)
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        conv = self.conv1d
        x = causal_conv1d_update(conv_state, x, conv.weight.squeeze(1), bias=conv.bias, silu=True)
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
        projected: Tensor = self.out_proj(y)
        return projected

    def allocate_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaState:
        """A state of zeros, for sequences that start.

        Args:
            batch: number of rows (of packed sequences, with cu_seqlens).
            device: the parameters' by default.
            dtype: the activations' type, the parameters' by default. The state is float32 (float64
                for float64).

        Raises:
            TypeError: batch is not an integer.
            ValueError: batch is negative, or dtype none of the four floating types.
        """
        owner = type(self).__name__
        check.integers(owner, batch=batch)
        check.not_negative(owner, batch=batch)
        check.dtype(owner, dtype)
        device = device or self.A_log.device
        dtype = accumulator_dtype(dtype or self.A_log.dtype)
        return MambaState(
            torch.zeros(batch, self.d_conv - 1, self.d_inner, device=device, dtype=dtype),
            torch.zeros(batch, self.d_inner, self.d_state, device=device, dtype=dtype),
        )

    @property
    def name(self) -> str:
        """The block's name, any str but the empty one (ValueError; TypeError if it is no str)."""
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"{type(self).__name__}: name must be a str; got {check.got(name)}")
        if not name:
            raise ValueError(f"{type(self).__name__}: name must not be empty; got ''")
        self._name = name

    @property
    def attributes(self) -> dict[str, int]:
        """The block's sizes by name; kernel_size is d_conv."""
        return {
            "d_model": self.d_model,
            "d_inner": self.d_inner,
            "d_state": self.d_state,
            "dt_rank": self.dt_rank,
            "kernel_size": self.d_conv,
        }

    @property
    def output_shape(self) -> list[int]:
        """(batch, length, d_model), where -1 stands for any size."""
        return [-1, -1, self.d_model]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.attributes.items())

    def _selection(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """x to scan, and the parameters that depend on it (section 3.2): delta, its bias if it is
        still to be added, B and C."""
        projected, x = project_inputs(self.x_proj, x)
        dt, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return x, *project_delta(self.dt_proj, dt), B, C
