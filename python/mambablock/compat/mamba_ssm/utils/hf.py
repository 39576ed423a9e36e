# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's configuration and weights, of a local folder or of the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["load_config_hf", "load_state_dict_hf"]


def load_config_hf(model_name: str) -> dict[str, Any]:
    """config.json of a folder or of a model on the hub, for which transformers is needed.

    Raises:
        FileNotFoundError: there is none.
    """
    config: dict[str, Any] = json.loads(_file(model_name, "config.json").read_text())
    return config


def load_state_dict_hf(
    model_name: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """pytorch_model.bin of a folder or of a model on the hub, on the device and of the dtype.

    Raises:
        FileNotFoundError: there is none.
    """
    path = _file(model_name, "pytorch_model.bin")
    state_dict: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in state_dict.items()}


def _file(model_name: str, name: str) -> Path:
    if Path(model_name).is_dir():
        return Path(model_name) / name
    from transformers.utils.hub import cached_file

    path = cached_file(model_name, name, _raise_exceptions_for_missing_entries=False)
    if path is None:
        raise FileNotFoundError(f"from_pretrained: {model_name} must have a {name}; found none")
    return Path(path)
