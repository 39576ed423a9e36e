# SPDX-License-Identifier: Apache-2.0
"""The implementations, mambablock and others, called alike on the same inputs and weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambablock import MambaBlock, causal_conv1d, reference, selective_scan
from mambablock.compat.causal_conv1d import causal_conv1d_fn
from mambablock.compat.mamba_ssm import selective_scan_fn

from .measure import Task
from .settings import D_CONV, D_INNER, D_MODEL, D_STATE

OURS, RECOMPUTING, LOOP, TRANSFORMERS, MAMBAPY, LINEARS = (
    "mambablock",
    "recompute=True",
    "PyTorch loop",
    "transformers",
    "mambapy",
    "four F.linear",
)
PYTORCH = "F.conv1d + F.silu"
MAMBA_SSM, CAUSAL_CONV1D = "mamba-ssm", "causal-conv1d"
HAS_TRANSFORMERS, HAS_MAMBAPY = (find_spec(name) is not None for name in (TRANSFORMERS, MAMBAPY))

Mixer = Callable[[Tensor], Any]
Prepare = Callable[[dict[str, Tensor]], Task]


def missing_packages() -> list[str]:
    packages = ((TRANSFORMERS, HAS_TRANSFORMERS), (MAMBAPY, HAS_MAMBAPY))
    return [
        f"{name} is not installed: its figures are left out (pip install {name})"
        for name, present in packages
        if not present
    ]


def missing_cuda_packages() -> list[str]:
    packages = {MAMBA_SSM: cuda_scans(), CAUSAL_CONV1D: cuda_convs()}
    return [
        f"{name}'s CUDA functions can't be imported: its figures are left out"
        for name, found in packages.items()
        if name not in found
    ]


def _importable(*modules: str) -> bool:
    """Whether they are there, and built for this torch."""
    try:
        for module in modules:
            import_module(module)
    except ImportError:
        return False
    return True


def tiled(length: int, width: int, dtype: torch.dtype, batch: int = 1) -> Tensor:
    """(batch, length, width) of normal numbers that repeat after 4096 steps: they take a while."""
    block = torch.randn(batch, min(length, 4096), width).to(dtype)
    return block.repeat(1, math.ceil(length / 4096), 1)[:, :length]


def scan_inputs(
    length: int,
    *,
    d_inner: int = D_INNER,
    d_state: int = D_STATE,
    dtype: torch.dtype,
    batch: int = 1,
) -> dict[str, Tensor]:
    """With A and delta_bias as a block's at the start of its training."""
    dt = torch.exp(torch.empty(d_inner).uniform_(math.log(0.001), math.log(0.1)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "u": tiled(length, d_inner, dtype, batch),
        "delta": tiled(length, d_inner, dtype, batch),
        "A": -torch.arange(1, d_state + 1, dtype=wide).repeat(d_inner, 1),
        "B": tiled(length, d_state, dtype, batch),
        "C": tiled(length, d_state, dtype, batch),
        "D": torch.ones(d_inner, dtype=wide),
        "z": tiled(length, d_inner, dtype, batch),
        "delta_bias": (dt + torch.log(-torch.expm1(-dt))).to(wide),
    }


def conv_inputs(
    length: int, *, d_inner: int = D_INNER, dtype: torch.dtype, batch: int = 1
) -> dict[str, Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": tiled(length, d_inner, dtype, batch),
        "weight": torch.randn(d_inner, D_CONV, dtype=wide),
        "bias": torch.randn(d_inner, dtype=wide),
    }


def time_last(inputs: dict[str, Tensor]) -> list[Tensor]:
    """In (batch, channels, length) memory, as other implementations have it."""
    return [t.transpose(1, 2).contiguous() if t.dim() == 3 else t for t in inputs.values()]


def first_steps(inputs: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Views of the first `length` steps."""
    return {name: t[:, :length] if t.dim() == 3 else t for name, t in inputs.items()}


def scan(inputs: dict[str, Tensor]) -> Task:
    def function(u, delta, A, B, C, D, z, delta_bias):  # type: ignore[no-untyped-def]
        return selective_scan(
            u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=True
        )

    return Task(function, *inputs.values())


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y: Tensor = causal_conv1d(x, weight, bias=bias, silu=True)
    return y


def pytorch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's convolution and SiLU, of (batch, channels, length)."""
    padded = F.conv1d(x, weight[:, None], bias, padding=D_CONV - 1, groups=x.shape[1])
    return F.silu(padded[..., : x.shape[2]])


def conv_task(inputs: dict[str, Tensor]) -> Task:
    return Task(conv, *inputs.values())


def compat_scan(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, D, z, delta_bias, function=selective_scan_fn
):
    """mamba-ssm's function, of this package or of that."""
    return function(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True)


def compat_conv(
    x: Tensor, weight: Tensor, bias: Tensor, function: Callable[..., Any] = causal_conv1d_fn
) -> Any:
    """causal-conv1d's function, of this package or of that."""
    return function(x, weight, bias, activation="silu")


def loop_scan(inputs: dict[str, Tensor]) -> Task:
    def function(u, delta, A, B, C, D, z, delta_bias):  # type: ignore[no-untyped-def]
        return reference.selective_scan(
            u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=True
        )

    return Task(function, *inputs.values())


def transformers_scan(inputs: dict[str, Tensor]) -> Task:
    import transformers
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    transformers.logging.set_verbosity_error()  # that its kernels are absent is known

    def function(u, delta, A, B, C, D, z, delta_bias):  # type: ignore[no-untyped-def]
        return mamba_selective_scan(
            u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True
        )

    return Task(function, *time_last(inputs))


def mambapy_scan(inputs: dict[str, Tensor]) -> Task:
    from mambapy.mamba import MambaBlock as MambapyBlock

    def function(u, delta, A, B, C, D, z, delta_bias):  # type: ignore[no-untyped-def]
        delta = F.softplus(delta + delta_bias)
        return MambapyBlock.selective_scan(None, u, delta, A, B, C, D) * F.silu(z)

    return Task(function, *inputs.values())


def mamba_ssm_scan(inputs: dict[str, Tensor]) -> Task:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return Task(partial(compat_scan, function=selective_scan_fn), *time_last(inputs))


def causal_conv1d_conv(inputs: dict[str, Tensor]) -> Task:
    from causal_conv1d import causal_conv1d_fn

    return Task(partial(compat_conv, function=causal_conv1d_fn), *time_last(inputs))


def cuda_scans() -> dict[str, Prepare]:
    found: dict[str, Prepare] = {OURS: scan}
    if _importable("selective_scan_cuda", "mamba_ssm.ops.selective_scan_interface"):
        found[MAMBA_SSM] = mamba_ssm_scan
    return found


def cuda_convs() -> dict[str, Prepare]:
    found: dict[str, Prepare] = {OURS: conv_task}
    if _importable("causal_conv1d_cuda", "causal_conv1d"):
        found[CAUSAL_CONV1D] = causal_conv1d_conv
    return found


def scans() -> dict[str, Prepare]:
    found: dict[str, Prepare] = {OURS: scan, LOOP: loop_scan}
    if HAS_TRANSFORMERS:
        found[TRANSFORMERS] = transformers_scan
    if HAS_MAMBAPY:
        found[MAMBAPY] = mambapy_scan
    return found


def transformers_mixer(block: MambaBlock) -> Any:
    import transformers
    from transformers.models.mamba.modeling_mamba import MambaMixer

    transformers.logging.set_verbosity_error()
    config = transformers.MambaConfig(
        hidden_size=D_MODEL, state_size=D_STATE, conv_kernel=D_CONV, num_hidden_layers=1
    )
    mixer = MambaMixer(config, layer_idx=0)
    mixer.load_state_dict(block.state_dict())
    return mixer


def mambapy_mixer(block: MambaBlock) -> Any:
    from mambapy.mamba import MambaBlock as MambapyBlock
    from mambapy.mamba import MambaConfig

    mixer = MambapyBlock(MambaConfig(d_model=D_MODEL, n_layers=1))
    mixer.load_state_dict(block.state_dict())
    return mixer


def recomputing_mixer(block: MambaBlock) -> MambaBlock:
    mixer = MambaBlock(D_MODEL, recompute=True)
    mixer.load_state_dict(block.state_dict())
    return mixer


def loop_mixer(block: MambaBlock) -> Mixer:
    """The block's own forward with the definition's operators."""

    def forward(x: Tensor) -> Any:
        with patch.multiple(
            "mambablock.block",
            causal_conv1d=reference.causal_conv1d,
            selective_scan=reference.selective_scan,
        ):
            return block(x)

    return forward


def mixers(block: MambaBlock) -> dict[str, Mixer]:
    """Of the block's weights."""
    found: dict[str, Mixer] = {OURS: block, RECOMPUTING: recomputing_mixer(block)}
    found[LOOP] = loop_mixer(block)
    if HAS_TRANSFORMERS:
        found[TRANSFORMERS] = transformers_mixer(block)
    if HAS_MAMBAPY:
        found[MAMBAPY] = mambapy_mixer(block)
    return found


def mixer_task(mixer: Mixer, block: MambaBlock, x: Tensor) -> Task:
    parameters = mixer.parameters() if isinstance(mixer, nn.Module) else block.parameters()
    return Task(lambda x, *_: mixer(x), x, *parameters)


def linears_task(block: MambaBlock, x: Tensor) -> Task:
    """The block's four matrix products for x alone, each on an input of its own."""
    layers = (block.in_proj, block.x_proj, block.dt_proj, block.out_proj)
    inputs = [torch.randn(*x.shape[:2], layer.in_features, dtype=x.dtype) for layer in layers]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(F.linear, tensors[:4], tensors[4:]))

    return Task(function, *inputs, *(layer.weight for layer in layers))


def under_autocast(task: Task, device: str) -> Task:
    task.function = torch.autocast(device, torch.bfloat16)(task.function)
    return task


def decoders(block: MambaBlock) -> dict[str, Mixer]:
    """Functions of x (1, d_model) that move a state of their own on by one token."""
    state, loop_state = block.allocate_state(1), block.allocate_state(1)

    def loop_step(x: Tensor) -> Any:
        with patch.multiple(
            "mambablock.block",
            causal_conv1d_update=reference.causal_conv1d_update,
            selective_state_update=reference.selective_state_update,
        ):
            return block.step(x, loop_state)

    found: dict[str, Mixer] = {OURS: lambda x: block.step(x, state), LOOP: loop_step}
    if HAS_TRANSFORMERS:
        found[TRANSFORMERS] = transformers_decoder(block)
    if HAS_MAMBAPY:
        found[MAMBAPY] = mambapy_decoder(block)
    return found


def transformers_decoder(block: MambaBlock) -> Mixer:
    from transformers import DynamicCache

    mixer = transformers_mixer(block).eval()
    cache = DynamicCache(config=mixer.config)

    def step(x: Tensor) -> Any:
        return mixer(x[:, None], cache)[:, 0]

    return step


def mambapy_decoder(block: MambaBlock) -> Mixer:
    mixer = mambapy_mixer(block)
    cache = (None, torch.zeros(1, D_INNER, D_CONV - 1))

    def step(x: Tensor) -> Any:
        nonlocal cache
        y, cache = mixer.step(x, cache)
        return y

    return step
