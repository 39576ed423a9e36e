# SPDX-License-Identifier: Apache-2.0
"""Autocast's decorators for an autograd.Function on CUDA, as mamba-ssm names them."""

from functools import partial

import torch

__all__ = ["custom_bwd", "custom_fwd"]

custom_fwd = partial(torch.amp.custom_fwd, device_type="cuda")
custom_bwd = partial(torch.amp.custom_bwd, device_type="cuda")
