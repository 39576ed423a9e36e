# SPDX-License-Identifier: Apache-2.0
"""mamba-ssm's language model of Mamba blocks (version 2.3)."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mambablock.compat.mamba_ssm.models.config_mamba import MambaConfig
from mambablock.compat.mamba_ssm.modules.block import Block
from mambablock.compat.mamba_ssm.modules.mamba_simple import Mamba
from mambablock.compat.mamba_ssm.modules.mlp import GatedMLP
from mambablock.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn
from mambablock.compat.mamba_ssm.utils.generation import GenerationMixin
from mambablock.compat.mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf

__all__ = ["MambaLMHeadModel", "MixerModel", "create_block"]

Device = torch.device | str | None


class CausalLMOutput(NamedTuple):
    logits: Tensor


def create_block(
    d_model: int,
    d_intermediate: int,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """A Block of a Mamba, and of a GatedMLP if d_intermediate is not 0.

    Raises:
        ImportError: ssm_cfg's layer is not "Mamba1", or layer_idx is in attn_layer_idx: attention
            and later Mambas are not provided.
    """
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    options = dict(ssm_cfg or {})
    layer = options.pop("layer", "Mamba1")
    if layer != "Mamba1" or layer_idx in (attn_layer_idx or []):
        got = "attention" if layer == "Mamba1" else layer
        raise ImportError(
            f"create_block: a layer must be Mamba1, all that mambablock has; got {got}"
        )
    norm: Any = RMSNorm if rms_norm else nn.LayerNorm
    mlp: Any = nn.Identity
    if d_intermediate != 0:
        mlp = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **factory)
    block = Block(
        d_model,
        partial(Mamba, layer_idx=layer_idx, **options, **factory),
        mlp,
        norm_cls=partial(norm, eps=norm_epsilon, **factory),
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx  # type: ignore[assignment]
    return block


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Biases to 0 but those marked _no_reinit, embeddings normal, and output projections drawn
    again, smaller by the root of the number of residual additions (Radford et al. 2019, GPT-2)."""
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if not rescale_prenorm_residual:
        return
    for name, parameter in module.named_parameters():
        if name in ("out_proj.weight", "fc2.weight"):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            with torch.no_grad():
                parameter.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MixerModel(nn.Module):
    """Embedding, blocks, final norm: tokens (batch, length) to (batch, length, d_model)."""

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        self.fused_add_norm = fused_add_norm
        self.layers = nn.ModuleList(
            create_block(
                *(d_model, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon),
                *(rms_norm, residual_in_fp32, fused_add_norm, i, device, dtype),
            )
            for i in range(n_layer)
        )
        norm: Any = RMSNorm if rms_norm else nn.LayerNorm
        self.norm_f = norm(d_model, eps=norm_epsilon, **factory)
        residuals = 1 if d_intermediate == 0 else 2
        initializer: dict[str, Any] = {"n_residuals_per_layer": residuals} | (initializer_cfg or {})
        self.apply(partial(_init_weights, n_layer=n_layer, **initializer))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of all layers, by their number."""
        layers: Any = self.layers
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(layers)
        }

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> Any:
        hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(
                hidden_states, residual, inference_params=inference_params, **mixer_kwargs
            )
        norm: Any = self.norm_f
        if not self.fused_add_norm:
            residual = hidden_states if residual is None else hidden_states + residual
            return norm(residual.to(norm.weight.dtype))
        return layer_norm_fn(
            hidden_states,
            norm.weight,
            norm.bias,
            residual=residual,
            eps=norm.eps,
            residual_in_fp32=self.residual_in_fp32,
            is_rms_norm=isinstance(norm, RMSNorm),
        )


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """MixerModel with a language modelling head; generate continues tokens."""

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocab_size = -(-config.vocab_size // multiple) * multiple
        self.backbone = MixerModel(
            d_model=config.d_model,
            n_layer=config.n_layer,
            d_intermediate=config.d_intermediate,
            vocab_size=vocab_size,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            device=device,
            dtype=dtype,
        )
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, device=device, dtype=dtype)
        self.apply(partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the embedding's weight with the head, if config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of all layers, by their number."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Logits of tokens (batch, length), of the last num_last_tokens if that is not 0.

        position_ids change nothing.
        """
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return CausalLMOutput(self.lm_head(hidden_states))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> MambaLMHeadModel:
        """A model saved in a local folder or on the Hugging Face hub.

        Raises:
            FileNotFoundError: config.json or pytorch_model.bin is missing.
        """
        config = MambaConfig(**load_config_hf(pretrained_model_name))
        model = cls(config, device=device, dtype=dtype, **kwargs)
        model.load_state_dict(load_state_dict_hf(pretrained_model_name, device, dtype))
        return model

    def save_pretrained(self, save_directory: str) -> None:
        """Write config.json and pytorch_model.bin into a folder, which is made if need be."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(self.config.__dict__, indent=4))
