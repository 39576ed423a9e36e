# SPDX-License-Identifier: Apache-2.0
"""The implementations, mambablock and others, called alike on the same inputs and weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambablock import MambaBlock, causal_conv1d, reference, selective_scan
from mambablock.compat.causal_conv1d import causal_conv1d_fn
from mambablock.compat.mamba_ssm import selective_scan_fn

from .measure import Task
from .settings import D_CONV, D_INNER, D_MODEL, D_STATE

OURS, RECOMPUTING, LOOP = "mambablock", "recompute=True", "PyTorch loop"
LINEARS, PYTORCH = "four F.linear", "F.conv1d + F.silu"
TRANSFORMERS, MAMBAPY = "transformers", "mambapy"
MAMBA_SSM, CAUSAL_CONV1D = "mamba-ssm", "causal-conv1d"
# What is imported of each package, CUDA extensions too.
MODULES: dict[str, tuple[str, ...]] = {
    TRANSFORMERS: ("transformers",),
    MAMBAPY: ("mambapy",),
    MAMBA_SSM: ("selective_scan_cuda", "mamba_ssm.ops.selective_scan_interface"),
    CAUSAL_CONV1D: ("causal_conv1d_cuda", "causal_conv1d"),
}

Mixer = Callable[[Tensor], Any]
Prepare = Callable[[dict[str, Tensor]], Task]
T = TypeVar("T")


def importable(name: str) -> bool:
    """Whether an implementation's package is there, and built for this torch."""
    try:
        for module in MODULES.get(name, ()):
            import_module(module)
    except ImportError:
        return False
    return True


def _present(by_name: dict[str, T]) -> dict[str, T]:
    return {name: value for name, value in by_name.items() if importable(name)}


def tiled(length: int, width: int, dtype: torch.dtype, batch: int = 1) -> Tensor:
    """(batch, length, width) of normal numbers that repeat after 4096 steps: drawing is slow."""
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
    """In (batch, channels, length) memory, as other implementations take it."""
    return [t.transpose(1, 2).contiguous() if t.dim() == 3 else t for t in inputs.values()]


def first_steps(inputs: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Views of the first `length` steps."""
    return {name: t[:, :length] if t.dim() == 3 else t for name, t in inputs.items()}


def _scan_of(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The scan as a function of tensors alone, in the order of scan_inputs."""

    def function(*tensors: Tensor) -> Any:
        *required, D, z, delta_bias = tensors
        return operator(*required, D=D, z=z, delta_bias=delta_bias, delta_softplus=True)

    return function


def _conv_of(operator: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, weight, bias: operator(x, weight, bias=bias, silu=True)


# This package's functions with the signatures of mamba-ssm and causal-conv1d.
compat_scan = _scan_of(selective_scan_fn)
compat_conv = partial(causal_conv1d_fn, activation="silu")


def pytorch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's convolution and SiLU, of (batch, channels, length)."""
    padded = F.conv1d(x, weight[:, None], bias, padding=D_CONV - 1, groups=x.shape[1])
    return F.silu(padded[..., : x.shape[2]])


def scan(inputs: dict[str, Tensor]) -> Task:
    return Task(_scan_of(selective_scan), *inputs.values())


def conv(inputs: dict[str, Tensor]) -> Task:
    return Task(_conv_of(causal_conv1d), *inputs.values())


def loop_scan(inputs: dict[str, Tensor]) -> Task:
    return Task(_scan_of(reference.selective_scan), *inputs.values())


def loop_conv(inputs: dict[str, Tensor]) -> Task:
    return Task(_conv_of(reference.causal_conv1d), *inputs.values())


def transformers_scan(inputs: dict[str, Tensor]) -> Task:
    return Task(_scan_of(_modeling_mamba().mamba_selective_scan), *time_last(inputs))


def mambapy_scan(inputs: dict[str, Tensor]) -> Task:
    from mambapy.mamba import MambaBlock as MambapyBlock

    def function(*tensors: Tensor) -> Any:
        u, delta, A, B, C, D, z, delta_bias = tensors
        delta = F.softplus(delta + delta_bias)
        return MambapyBlock.selective_scan(None, u, delta, A, B, C, D) * F.silu(z)

    return Task(function, *inputs.values())


def mamba_ssm_scan(inputs: dict[str, Tensor]) -> Task:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return Task(_scan_of(selective_scan_fn), *time_last(inputs))


def causal_conv1d_conv(inputs: dict[str, Tensor]) -> Task:
    from causal_conv1d import causal_conv1d_fn

    return Task(partial(causal_conv1d_fn, activation="silu"), *time_last(inputs))


def scans() -> dict[str, Prepare]:
    others = {LOOP: loop_scan, TRANSFORMERS: transformers_scan, MAMBAPY: mambapy_scan}
    return _present({OURS: scan, **others})


def cuda_scans() -> dict[str, Prepare]:
    return _present({OURS: scan, MAMBA_SSM: mamba_ssm_scan})


def cuda_convs() -> dict[str, Prepare]:
    return _present({OURS: conv, CAUSAL_CONV1D: causal_conv1d_conv})


def _modeling_mamba() -> Any:
    import transformers
    from transformers.models.mamba import modeling_mamba

    transformers.logging.set_verbosity_error()  # it warns that its kernels are absent
    return modeling_mamba


def transformers_mixer(block: MambaBlock) -> Any:
    modeling = _modeling_mamba()
    config = modeling.MambaConfig(
        hidden_size=D_MODEL, state_size=D_STATE, conv_kernel=D_CONV, num_hidden_layers=1
    )
    mixer = modeling.MambaMixer(config, layer_idx=0)
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


def _with_reference(function: Mixer, *operators: str) -> Mixer:
    """A block, or its step, with these operators of the reference."""
    by_name = {name: getattr(reference, name) for name in operators}

    def loop(x: Tensor) -> Any:
        with patch.multiple("mambablock.block", **by_name):
            return function(x)

    return loop


def loop_mixer(block: MambaBlock) -> Mixer:
    return _with_reference(block, "causal_conv1d", "selective_scan")


def loop_decoder(block: MambaBlock) -> Mixer:
    return _with_reference(decoder(block), "causal_conv1d_update", "selective_state_update")


def mixers(block: MambaBlock) -> dict[str, Mixer]:
    """With the block's weights."""
    others = {LOOP: loop_mixer, TRANSFORMERS: transformers_mixer, MAMBAPY: mambapy_mixer}
    makers = _present({RECOMPUTING: recomputing_mixer, **others})
    return {OURS: block, **{name: make(block) for name, make in makers.items()}}


def mixer_task(mixer: Mixer, block: MambaBlock, x: Tensor) -> Task:
    parameters = mixer.parameters() if isinstance(mixer, nn.Module) else block.parameters()
    return Task(lambda x, *_: mixer(x), x, *parameters)


def linears_task(block: MambaBlock, x: Tensor) -> Task:
    """The block's four matrix products alone, each on an input of its own with x's sizes."""
    layers = (block.in_proj, block.x_proj, block.dt_proj, block.out_proj)
    inputs = [torch.randn(*x.shape[:-1], layer.in_features, dtype=x.dtype) for layer in layers]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(F.linear, tensors[:4], tensors[4:]))

    return Task(function, *inputs, *(layer.weight for layer in layers))


def under_autocast(task: Task, device: str) -> Task:
    task.function = torch.autocast(device, torch.bfloat16)(task.function)
    return task


def decoders(block: MambaBlock) -> dict[str, Mixer]:
    """Functions of x (1, d_model) that advance a state of their own by one token."""
    others = {LOOP: loop_decoder, TRANSFORMERS: transformers_decoder, MAMBAPY: mambapy_decoder}
    makers = _present({OURS: decoder, **others})
    return {name: make(block) for name, make in makers.items()}


def decoder(block: MambaBlock) -> Mixer:
    state = block.allocate_state(1)
    return lambda x: block.step(x, state)


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
