# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers' Mamba-1 models on mambablock's operators."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from .. import _checks as check
from .._layers import in_scan_dtype, is_plain, project_delta
from ..causal_conv1d import causal_conv1d
from ..linear import linear
from ..mamba_step import can_step, step_mixer
from ..selective_scan import selective_scan
from ..selective_state_update import selective_state_update

_wanted = (
    "transformers must be 5.16 or newer, with mixers and caches as in 5.24; "
    f"got {transformers.__version__}"
)
try:
    from transformers.cache_utils import Cache
    from transformers.models.falcon_mamba.modeling_falcon_mamba import (
        FalconMambaMixer,
        FalconMambaWeightlessRMSNorm,
    )
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer, JambaRMSNorm
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.models.zamba.modeling_zamba import ZambaMambaMixer
except ImportError as error:
    raise ImportError(f"mambablock.integrations.transformers: {_wanted}: {error}") from None

__all__ = ["patch", "patched", "unpatch"]

Model = TypeVar("Model", bound=nn.Module)


class _OperatorForward:
    """The forward that transformers' three Mamba-1 mixers share, on mambablock's operators."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        cache_params: Any = None,
        **_: Any,
    ) -> Tensor:
        # cache_params is what transformers before 5.24 calls the cache.
        cache = cache_params if cache is None else cache
        width = self.conv_kernel_size
        conv_state, ssm_state = _cached_states(cache, self.layer_idx)
        if conv_state is not None and attention_mask is None and hidden_states.shape[1] == 1:
            token, layer = hidden_states[:, 0], cache.layers[self.layer_idx]
            y: Tensor | None = self._step(token, conv_state, ssm_state, layer)
            if y is not None:
                return y[:, None]
        silu = self.activation in ("silu", "swish")
        # accelerate loads offloaded weights when a layer is called, and conv1d is not.
        conv_hook = getattr(self.conv1d, "_hf_hook", None)
        if conv_hook is not None:
            conv_hook.pre_forward(self.conv1d)

        inputs, z = self.in_proj(_masked(hidden_states, attention_mask)).chunk(2, dim=-1)
        if conv_state is not None:
            # The cache keeps one input more than the convolution needs.
            conv_state = conv_state[..., conv_state.shape[-1] - (width - 1) :].transpose(1, 2)
            # A copy, since the cache is overwritten below.
            conv_state = conv_state.to(in_scan_dtype(inputs).dtype, copy=True)
        x = causal_conv1d(
            inputs,
            self.conv1d.weight.squeeze(1),
            bias=self.conv1d.bias,
            silu=silu,
            initial_state=conv_state,
        )
        if conv_hook is not None:
            conv_hook.post_forward(self.conv1d, x)
        x = _masked(x if silu else self.act(x), attention_mask)

        if cache is not None:
            new_inputs = inputs.transpose(1, 2)
            if conv_state is None:
                new_inputs = F.pad(new_inputs, (max(width - inputs.shape[1], 0), 0))[..., -width:]
            cache.update_conv_state(new_inputs, self.layer_idx)

        state_size = self.ssm_state_size
        dt, B, C = self.x_proj(x).split([self.time_step_rank, state_size, state_size], dim=-1)
        if hasattr(self, "dt_layernorm"):
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        delta, delta_bias = project_delta(self.dt_proj, dt)
        A = -torch.exp(in_scan_dtype(self.A_log))
        options: dict[str, Any] = {
            "D": in_scan_dtype(self.D),
            "delta_bias": delta_bias,
            "delta_softplus": True,
        }

        if ssm_state is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            u, delta, B, C, z = (t[:, 0] for t in (x, delta, B, C, z))
            y = selective_state_update(ssm_state, u, delta, A, B, C, z=z, **options)[:, None]
        else:
            if ssm_state is not None:
                ssm_state = ssm_state.to(A.dtype, copy=True)
            y, last_state = selective_scan(
                x, delta, A, B, C, z=z, initial_state=ssm_state, return_final_state=True, **options
            )
            if cache is not None:
                cache.update_recurrent_state(last_state, self.layer_idx)
        projected: Tensor = self.out_proj(y)
        return projected

    def _step(
        self: Any, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor, layer: Any
    ) -> Tensor | None:
        """One token by mamba_step, which advances the cache's states; None where it may not."""
        norms = _step_norms(self)
        inputs = conv_state.shape[-1]
        if (
            norms is None
            or torch.is_grad_enabled()
            or self.activation not in ("silu", "swish")
            or inputs != self.conv_kernel_size
            or inputs == 1
            or getattr(layer, "record_past", False)
            or hasattr(self.conv1d, "_hf_hook")
            or not can_step(self, hidden_states)
        ):
            return None
        conv_state[..., 0] = conv_state[..., 1]  # the one input that the operator does not need
        conv_state = conv_state[..., 1:].transpose(1, 2)
        return step_mixer(self, conv_state, ssm_state, hidden_states, *norms)


class PatchedZambaMambaMixer(ZambaMambaMixer):
    """A patched ZambaMambaMixer: heads have their own projections and are the scan's groups."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        cache_params: Any = None,
        **_: Any,
    ) -> Tensor:
        cache = cache_params if cache is None else cache
        width, heads, silu = self.conv_kernel_size, self.n_mamba_heads, self.activation == "silu"
        conv_state, ssm_state = _cached_states(cache, self.layer_idx)
        # The rows of in_proj are of x and of z in turn.
        projected = self.in_proj(_masked(hidden_states, attention_mask))
        inputs, z = projected.unflatten(-1, (-1, 2)).unbind(-1)
        if conv_state is not None:
            conv_state = conv_state[..., conv_state.shape[-1] - (width - 1) :].transpose(1, 2)
            conv_state = conv_state.to(in_scan_dtype(inputs).dtype, copy=True)
        x = causal_conv1d(
            inputs,
            self.conv1d.weight.squeeze(1),
            bias=self.conv1d.bias,
            silu=silu,
            initial_state=conv_state,
        )
        x = _masked(x if silu else self.act(x), attention_mask)
        if cache is not None:
            new_inputs = inputs.transpose(1, 2)
            if conv_state is None:
                new_inputs = F.pad(new_inputs, (max(width - inputs.shape[1], 0), 0))[..., -width:]
            cache.update_conv_state(new_inputs, self.layer_idx)

        of_heads = torch.einsum("blhd,hrd->blhr", x.unflatten(-1, (heads, -1)), self.x_proj_weight)
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        dt, B, C = of_heads.split(sizes, dim=-1)
        delta = torch.einsum("blhr,hdr->blhd", dt, self.dt_proj_weight).flatten(2)
        A = -torch.exp(in_scan_dtype(self.A_log)).flatten(0, 1)
        options: dict[str, Any] = {
            "D": in_scan_dtype(self.D).flatten(),
            "delta_bias": in_scan_dtype(self.dt_proj_bias).flatten(),
            "delta_softplus": True,
        }
        if ssm_state is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            h = ssm_state.view(ssm_state.shape[0], -1, ssm_state.shape[-1])
            u, delta, B, C, z = (t[:, 0] for t in (x, delta, B, C, z))
            y = selective_state_update(h, u, delta, A, B, C, z=z, **options)[:, None]
        else:
            if ssm_state is not None:
                ssm_state = ssm_state.flatten(1, 2).to(A.dtype, copy=True)
            y, last_state = selective_scan(
                x, delta, A, B, C, z=z, initial_state=ssm_state, return_final_state=True, **options
            )
            if cache is not None:
                last_state = last_state.unflatten(1, (heads, -1))
                cache.update_recurrent_state(last_state, self.layer_idx)
        out: Tensor = self.out_proj(y)
        return out


class PatchedMambaMixer(_OperatorForward, MambaMixer):
    """A patched MambaMixer."""


class PatchedFalconMambaMixer(_OperatorForward, FalconMambaMixer):
    """A patched FalconMambaMixer."""


class PatchedJambaMambaMixer(_OperatorForward, JambaMambaMixer):
    """A patched JambaMambaMixer."""


class FewRowsLinear(nn.Linear):
    """A model's head, fast where few tokens' logits are wanted."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


_patched_classes: dict[type[nn.Module], type[nn.Module]] = {
    MambaMixer: PatchedMambaMixer,
    FalconMambaMixer: PatchedFalconMambaMixer,
    JambaMambaMixer: PatchedJambaMambaMixer,
    ZambaMambaMixer: PatchedZambaMambaMixer,
}
_patched_heads: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FewRowsLinear}
_original_classes = {n: old for old, n in (_patched_classes | _patched_heads).items()}
_forward_arguments = [
    ["self", "hidden_states", cache, "attention_mask"] for cache in ("cache", "cache_params")
]


def patch(model: Model) -> Model:
    """Make every Mamba-1 mixer of a transformers model compute with mambablock's operators.

    MambaMixer, FalconMambaMixer, JambaMambaMixer and ZambaMambaMixer are known; a head that is a
    plain nn.Linear becomes faster for few tokens. Only the code changes, in place: the weights, the
    cache and the state_dict stay what they were. A model that is already patched stays as it is.

    Differences from an unpatched model: the scan and its sums are float32 whatever the weights'
    type; several tokens at once continue a cache's state, where transformers restarts the scan;
    an adapter on dt_proj is applied, where transformers uses only its weight.

    Args:
        model: a model, or any module that has mixers in it.

    Returns:
        The model itself.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: there is no Mamba-1 mixer in it.
        ImportError: transformers' mixers or caches are not as this version knows them.
    """
    _patch("patch", model)
    return model


def unpatch(model: Model) -> Model:
    """Undo patch, in place; a model that is not patched stays as it is. Returns the model.

    Raises:
        TypeError: model is not an nn.Module.
    """
    _change_classes(_mixers("unpatch", model, _original_classes), _original_classes)
    return model


@contextmanager
def patched(model: Model) -> Iterator[Model]:
    """The model, patched within the block; after it, as it was before.

    Raises as :func:`patch` does.
    """
    before = _mixers("patched", model, _patched_classes) + _heads(model)
    _patch("patched", model)
    try:
        yield model
    finally:
        _change_classes(before, _original_classes)


def _patch(function: str, model: nn.Module) -> None:
    mixers = _mixers(function, model, {*_patched_classes, *_original_classes})
    _require_known_transformers(function)
    if not mixers:
        names = ", ".join(mixer.__name__ for mixer in _patched_classes)
        raise ValueError(
            f"{function}: model must hold a Mamba-1 mixer ({names}); got {type(model).__name__}, "
            "which has none"
        )
    _change_classes(mixers, _patched_classes)
    _change_classes(_heads(model), _patched_heads)


def _heads(model: nn.Module) -> list[nn.Module]:
    models = (m for m in model.modules() if isinstance(m, transformers.PreTrainedModel))
    heads = (m.get_output_embeddings() for m in models)  # type: ignore[no-untyped-call]
    return [head for head in dict.fromkeys(heads) if type(head) in _patched_heads]


def _mixers(function: str, model: nn.Module, classes: Any) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module; got {check.got(model)}")
    return [module for module in model.modules() if type(module) in classes]


def _change_classes(
    mixers: list[nn.Module], classes: dict[type[nn.Module], type[nn.Module]]
) -> None:
    for mixer in mixers:
        mixer.__class__ = classes.get(type(mixer), type(mixer))
        if "_old_forward" in mixer.__dict__:
            # accelerate's hook keeps the forward that it wraps.
            mixer._old_forward = type(mixer).forward.__get__(mixer)


def _require_known_transformers(function: str) -> None:
    # Before 5.16 the mixers had other forwards, and kept FalconMamba's norms elsewhere.
    unknown = [
        mixer.__name__
        for mixer in _patched_classes
        if not hasattr(sys.modules[mixer.__module__], "mamba_selective_scan")
        or list(inspect.signature(mixer.forward).parameters)[:4] not in _forward_arguments
    ]
    methods = ("has_previous_state", "update_conv_state", "update_recurrent_state")
    unknown += [f"Cache.{name}" for name in methods if not hasattr(Cache, name)]
    if unknown:
        raise ImportError(
            f"{function}: {_wanted}, whose {', '.join(unknown)} mambablock does not know"
        )


def _cached_states(cache: Any, layer: int) -> tuple[Tensor | None, Tensor | None]:
    """The inputs (batch, d_inner, d_conv or more) and h (batch, d_inner, d_state) so far."""
    if cache is None or not cache.has_previous_state(layer):
        return None, None
    return cache.layers[layer].conv_states[0], cache.layers[layer].recurrent_states[0]


def _step_norms(mixer: Any) -> tuple[list[Tensor | None], float | None] | None:
    """The weights and eps of a mixer's norms of dt, B and C, as mamba_step takes them; None if it
    does not."""
    if not hasattr(mixer, "dt_layernorm"):
        return [None] * 3, None
    norms = (mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm)
    if not all(map(is_plain, norms)):
        return None
    weights: list[Tensor | None] = [None] * 3
    if all(type(norm) is FalconMambaWeightlessRMSNorm for norm in norms):
        eps = {norm.eps for norm in norms}
    elif all(type(norm) is JambaRMSNorm for norm in norms):
        weights, eps = [n.weight for n in norms], {norm.variance_epsilon for norm in norms}
    else:
        return None
    return (weights, eps.pop()) if len(eps) == 1 else None


def _masked(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Zeros at padding; attention_mask is (batch, length)."""
    if attention_mask is None:
        return hidden_states
    return hidden_states * attention_mask[:, :, None].to(hidden_states.dtype)
