# SPDX-License-Identifier: Apache-2.0
"""A Mamba block whose channels lie over the ranks of a mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement, _StridedShard

_LAYERS = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj")


class TensorParallel(ParallelStyle):
    """Distribute d_inner of a Mamba-1 block over a mesh, for
    :func:`torch.distributed.tensor.parallel.parallelize_module`.

    The block is a :class:`mambablock.MambaBlock`, or a mixer of a transformers model that
    :func:`mambablock.integrations.transformers.patch` has patched::

        parallelize_module(block, mesh["tp"], TensorParallel())
        parallelize_module(model, mesh["tp"], {"backbone.layers.*.mixer": TensorParallel()})

    Each rank computes d_inner / ranks channels. There is one all-reduce after x_proj, in the
    forward and in the backward, one after out_proj, and one of the input's gradient. Input and
    output are replicated; all ranks must compute the same loss of them. States hold a rank's
    channels, and `d_inner` becomes their number. Parameters become DTensors, whose full_tensor() is
    that of the whole block; their names stay. A state_dict made or loaded with full_state_dict, but
    not with broadcast_from_rank0, is the whole block's, and what torch.distributed.checkpoint saves
    of a sharded one, but not with cpu_offload, loads on any mesh; an optimizer's needs
    full_state_dict. With FSDP, which divides in_proj's weight along its other dimension, so that it
    can be loaded::

        fully_shard(block, mesh=mesh["dp"], shard_placement_fn=TensorParallel.shard_placement_fn)

    Raises, when it is applied and on every rank:
        TypeError: the module is no Mamba-1 block.
        ValueError: d_inner is no multiple of the number of ranks, or mesh has not one dimension.
    """

    @staticmethod
    def shard_placement_fn(parameter: nn.Parameter) -> Shard | None:
        """fully_shard's: along which dimension FSDP is to divide a parameter; None for its own
        choice, the first."""
        return Shard(1) if isinstance(parameter, DTensor) and _strided(parameter) else None

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        missing = [name for name in _LAYERS if not hasattr(module, name)]
        if missing:
            raise TypeError(
                f"TensorParallel: module must be a MambaBlock or a patched Mamba-1 mixer; "
                f"got {type(module).__name__} without {missing[0]}"
            )
        if device_mesh.ndim != 1:
            raise ValueError(
                f"TensorParallel: mesh must have one dimension; got {device_mesh.ndim}"
            )
        ranks, d_inner = device_mesh.size(), module.A_log.shape[0]
        if d_inner % ranks:
            raise ValueError(
                f"TensorParallel: d_inner must be a multiple of the ranks={ranks}; got {d_inner}"
            )
        for name, parameter in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            sharded = distribute_tensor(
                parameter.detach(),
                device_mesh,
                [_placement(name)],
                src_data_rank=self.src_data_rank,
            )
            distributed = nn.Parameter(sharded, requires_grad=parameter.requires_grad)
            for attribute, value in vars(parameter).items():  # such as _no_weight_decay
                setattr(distributed, attribute, value)
            module.get_submodule(owner).register_parameter(leaf, distributed)
        if hasattr(module, "d_inner"):
            module.d_inner = d_inner // ranks
        group = device_mesh.get_group().group_name
        object.__setattr__(module, "_tensor_parallel", (group, ranks, device_mesh.get_local_rank()))
        after_norms = [
            n for n in ("dt_layernorm", "b_layernorm", "c_layernorm") if hasattr(module, n)
        ]
        # What each rank's channels read has a share of the gradient on each rank.
        both = not after_norms
        module.x_proj.register_forward_hook(_reducing(group, forward=True, backward=both))
        for name in after_norms:
            hook = _reducing(group, forward=False, backward=True)
            getattr(module, name).register_forward_hook(hook)
        module.out_proj.register_forward_hook(_reducing(group, forward=True, backward=False))
        module.register_state_dict_post_hook(_describe_rows)
        module.register_load_state_dict_pre_hook(_refuse_misplaced)
        module.__class__ = _on_local_parameters(type(module))
        block: nn.Module = module
        return block


def _placement(name: str) -> Placement:
    layer = name.partition(".")[0]
    if name == "in_proj.weight":
        return _StridedShard(0, split_factor=2)  # of x's rows and of z's
    if name in ("x_proj.weight", "out_proj.weight"):
        return Shard(1)
    if layer in ("conv1d", "dt_proj", "A_log", "D"):
        return Shard(0)
    return Replicate()


def _strided(parameter: DTensor) -> list[Placement]:
    return [p for p in parameter.placements if isinstance(p, _StridedShard)]


def _describe_rows(module: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Makes a state_dict's in_proj.weight two chunks, x's rows and z's, to
    torch.distributed.checkpoint, which takes strided rows for consecutive ones."""
    weight = state_dict[f"{prefix}in_proj.weight"]
    if not isinstance(weight, DTensor) or len(_strided(weight)) != 1:
        return
    _, ranks, rank = module._tensor_parallel
    mesh, placements = weight.device_mesh, weight.placements
    column = compute_local_shape_and_global_offset(weight.shape, mesh, placements)[1][1]
    channels = weight.shape[0] // 2
    rows = [rank * channels // ranks + first for first in (0, channels)]
    local = weight._local_tensor
    chunks = LocalShardsWrapper(list(local.data.chunk(2)), [(row, column) for row in rows])
    for method in ("__create_write_items__", "__create_chunk_list__", "__get_tensor_shard__"):
        setattr(local, method, getattr(chunks, method))


def _refuse_misplaced(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Raises where a loaded in_proj.weight has rows of another place, which torch does silently."""
    name, weight = f"{prefix}in_proj.weight", module.in_proj._parameters["weight"]
    if state_dict.get(name) is weight:
        # Taken for consecutive rows, and written into the parameter before it is loaded.
        raise RuntimeError(
            f"TensorParallel: {name} must be loaded without broadcast_from_rank0, which cannot "
            "place its rows; got the parameter itself"
        )
    if len(_strided(weight)) > 1:
        raise RuntimeError(
            f"TensorParallel: {name} must be divided by fully_shard(..., shard_placement_fn="
            f"TensorParallel.shard_placement_fn) to be loaded; got {weight.placements}"
        )


def _reduced(tensor: Tensor, group: str, *, forward: bool, backward: bool) -> Tensor:
    """The sum over the ranks, in the forward or in the backward or in both."""
    result: Tensor = _Reduced.apply(tensor, group, forward, backward)  # type: ignore[no-untyped-call]
    return result


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: str, forward: bool, backward: bool) -> Tensor:
        ctx.group, ctx.backward = group, backward
        return _summed(tensor, group) if forward else tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _summed(gradient, ctx.group) if ctx.backward else gradient, None, None, None


def _summed(tensor: Tensor, group: str) -> Tensor:
    ops = torch.ops._c10d_functional
    summed: Tensor = ops.wait_tensor(ops.all_reduce(tensor.contiguous(), "sum", group))
    return summed


def _reducing(group: str, *, forward: bool, backward: bool) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Any:
        return _reduced(output, group, forward=forward, backward=backward)

    return hook


class _OnLocalParameters:
    """Computes with each rank's part of the parameters."""

    _tensor_parallel: tuple[str, int, int]

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        group = self._tensor_parallel[0]
        hidden_states = _reduced(hidden_states, group, forward=False, backward=True)
        with _local_parameters(self, of_mix=False if hasattr(super(), "_mix") else None):
            return super().forward(hidden_states, *arguments, **options)  # type: ignore[misc]

    def _mix(self, *arguments: Any, **options: Any) -> Any:
        # Here, where the backward recomputes it, alike both times.
        with _local_parameters(self, of_mix=True):
            return super()._mix(*arguments, **options)  # type: ignore[misc]

    @torch.no_grad()
    def step(self, *arguments: Any) -> Any:
        with _local_parameters(self):
            return super().step(*arguments)  # type: ignore[misc]


def _on_local_parameters(block_class: type) -> Any:
    return type(block_class.__name__, (_OnLocalParameters, block_class), {})


@contextmanager
def _local_parameters(module: Any, of_mix: bool | None = None) -> Iterator[None]:
    """Within it, parameters are tensors of this rank, through which gradients flow back: all, or
    those between in_proj and out_proj, or the others."""
    group, ranks, rank = module._tensor_parallel
    around = (module.in_proj, module.out_proj)
    owners = [
        owner
        for owner in module.modules()
        if owner._parameters and (of_mix is None or (owner not in around) == of_mix)
    ]
    held = [dict(owner._parameters) for owner in owners]
    try:
        for owner in owners:
            for name, parameter in owner._parameters.items():
                if isinstance(parameter, DTensor):
                    local = parameter.to_local()
                    if owner is module.out_proj and name == "bias":
                        # Every rank adds a part of it; its gradient is whole on each.
                        local = local - local.detach() * (1 - 1 / ranks)
                    elif owner is module.in_proj and name == "bias":
                        # It is replicated: whole tensors could not be loaded into x's and z's rows.
                        local = _reduced(local, group, forward=False, backward=True)
                        local = local.unflatten(0, (2, ranks, -1))[:, rank].flatten()
                    owner._parameters[name] = local
        yield
    finally:
        for owner, parameters in zip(owners, held, strict=True):
            owner._parameters.update(parameters)
