# SPDX-License-Identifier: Apache-2.0
"""How the length of a sequence lies over the ranks of a group, and what they exchange of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from . import _checks
from . import _library as library

# Above so many ranks each combines what all of them sent of a part of the channels, and hands the
# results back, instead of combining everything itself.
GATHERED_RANKS = 16

LAYOUTS = ("contiguous", "zigzag")


class ContextParallel:
    """How the length dimension lies over the ranks of a mesh; immutable.

    Given as `context_parallel=` to :func:`mambablock.causal_conv1d`,
    :func:`mambablock.selective_scan` and :meth:`mambablock.MambaBlock.forward`: each rank passes
    its shard along length of every activation, and the same parameters. The results are those of
    the whole sequence up to rounding, the same bits on every run. Gradients are those of the sum of
    all ranks' losses: that of a shard is complete on its rank; of a parameter or an initial state
    each rank has its share, and their sum over the ranks is the whole. All ranks must call forward
    and backward.

    With `exp(A sum(dt))` as the decay over a shard, and its final state from an initial one of 0,
    the ranks exchange d_inner * (d_state + 1) accumulators per row in the forward, and
    d_inner * d_state in the backward; the convolution exchanges the last d_conv - 1 inputs.

    Args:
        mesh: a one-dimensional DeviceMesh, such as mesh["cp"], or a ProcessGroup.
        layout: "contiguous": rank r holds a contiguous piece, in rank order, of any length, 0
            included. "zigzag": of 2 * ranks equal pieces, rank r holds piece r followed by piece
            2 * ranks - 1 - r, as context parallel attention has it.
        cu_seqlens: (sequences + 1), int32 or int64, rising from 0 to the global length, the same on
            every rank: packs several sequences into the row; batch must be 1.
        check: compare every call's shapes, types and cu_seqlens over the ranks before it, and say
            which rank disagrees; by default where TORCH_DISTRIBUTED_DEBUG is set to INFO or DETAIL.

    Raises:
        TypeError: mesh is neither of the two, or cu_seqlens no Tensor.
        ValueError: mesh has not one dimension or not this rank, layout is unknown, or cu_seqlens
            has a wrong shape or type.
        AttributeError: an attribute is assigned.
    """

    group: dist.ProcessGroup
    group_name: str
    size: int
    rank: int
    layout: str
    cu_seqlens: Tensor | None
    check: bool

    def __init__(
        self,
        mesh: Any,
        *,
        layout: str = "contiguous",
        cu_seqlens: Tensor | None = None,
        check: bool | None = None,
    ) -> None:
        if isinstance(mesh, DeviceMesh):
            if mesh.ndim != 1:
                fail(f"mesh must have one dimension; got {mesh.ndim}, {mesh.mesh_dim_names}")
            group = mesh.get_group()
        elif isinstance(mesh, dist.ProcessGroup):
            group = mesh
        else:
            fail(f"mesh must be a DeviceMesh or a ProcessGroup; got {_checks.got(mesh)}", TypeError)
        rank = dist.get_rank(group)
        if rank < 0:
            fail(f"mesh must hold this rank; got rank {dist.get_rank()} outside of it")
        if layout not in LAYOUTS:
            fail(f"layout must be 'contiguous' or 'zigzag'; got {layout!r}")
        if cu_seqlens is not None:
            if not isinstance(cu_seqlens, Tensor):
                fail(
                    f"cu_seqlens must be a Tensor or None; got {_checks.got(cu_seqlens)}", TypeError
                )
            if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
                fail(f"cu_seqlens must be (sequences + 1); got {tuple(cu_seqlens.shape)}")
            if cu_seqlens.dtype not in (torch.int32, torch.int64):
                fail(f"cu_seqlens must be int32 or int64; got {cu_seqlens.dtype}")
        if check is None:
            check = os.environ.get("TORCH_DISTRIBUTED_DEBUG", "OFF") != "OFF"
        values = {
            "group": group,
            "group_name": group.group_name,
            "size": group.size(),
            "rank": rank,
            "layout": layout,
            "cu_seqlens": cu_seqlens,
            "check": check,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        fail(f"{name} must not be assigned; make another ContextParallel", AttributeError)

    def __delattr__(self, name: str) -> NoReturn:
        fail(f"{name} must not be deleted; make another ContextParallel", AttributeError)

    def __repr__(self) -> str:
        return f"ContextParallel(rank {self.rank} of {self.size}, layout={self.layout!r})"


def fail(text: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"ContextParallel: {text}")


# Collectives. The functional ones, which torch.compile traces.


def gather(cp: ContextParallel, tensor: Tensor) -> Tensor:
    """(...) of every rank: (ranks, ...)."""
    if tensor.numel() == 0:
        return tensor.new_zeros((cp.size, *tensor.shape))
    ops = torch.ops._c10d_functional
    gathered: Tensor = ops.wait_tensor(
        ops.all_gather_into_tensor(tensor.contiguous().flatten(), cp.size, cp.group_name)
    )
    return gathered.view(cp.size, *tensor.shape)


def swap(cp: ContextParallel, tensor: Tensor) -> Tensor:
    """(ranks, ...), row r for rank r: row r is then what rank r had for this one."""
    if tensor.numel() == 0:
        return tensor
    ops, ones = torch.ops._c10d_functional, [1] * cp.size
    swapped: Tensor = ops.wait_tensor(
        ops.all_to_all_single(tensor.contiguous(), ones, ones, cp.group_name)
    )
    return swapped


def total(cp: ContextParallel, tensor: Tensor) -> Tensor:
    """The sum over the ranks, the same bits on each."""
    if tensor.numel() == 0:
        return tensor
    ops = torch.ops._c10d_functional
    summed: Tensor = ops.wait_tensor(ops.all_reduce(tensor.contiguous(), "sum", cp.group_name))
    return summed


# Pieces: each rank has one, or with zigzag two. A chain is all of them, as the scan goes.


def pieces(cp: ContextParallel) -> int:
    return 2 if cp.layout == "zigzag" else 1


def own_pieces(cp: ContextParallel, reverse: bool) -> list[int]:
    """The places of this rank's pieces in the chain."""
    places = [cp.rank, 2 * cp.size - 1 - cp.rank][: pieces(cp)]
    return [pieces(cp) * cp.size - 1 - place for place in places] if reverse else places


def chained(cp: ContextParallel, ranks: Tensor, reverse: bool) -> Tensor:
    """(ranks, pieces of each, ...) to the chain (all pieces, ...)."""
    halves = [half if i == 0 else half.flip(0) for i, half in enumerate(ranks.unbind(1))]
    chain = torch.cat(halves)
    return chain.flip(0) if reverse else chain


def unchained(cp: ContextParallel, chain: Tensor, reverse: bool) -> Tensor:
    """The inverse of chained."""
    halves = (chain.flip(0) if reverse else chain).chunk(pieces(cp))
    return torch.stack([half if i == 0 else half.flip(0) for i, half in enumerate(halves)], dim=1)


# (chain, the first of its channels, which pieces' results are wanted) to their results and that of
# the whole row, if it is wanted. All have the channels last.
Combined = tuple[Tensor, Tensor | None]
Combine = Callable[[Tensor, int, Sequence[int]], Combined]
Forward = Callable[..., Sequence[Tensor]]
Backward = Callable[..., Sequence[Tensor | None]]


def exchange(cp: ContextParallel, local: Tensor, reverse: bool, combine: Combine) -> Combined:
    """Combines what every piece has, (pieces, ..., channels) on each rank, to the results of this
    rank's pieces and that of the whole row."""
    if cp.size <= GATHERED_RANKS:
        chain = chained(cp, gather(cp, local), reverse)
        return combine(chain, 0, own_pieces(cp, reverse))
    channels = local.shape[-1]
    part = -(-channels // cp.size)
    padded = F.pad(local, (0, part * cp.size - channels))
    parts = padded.unflatten(-1, (cp.size, part)).movedim(-2, 0)
    chain = chained(cp, swap(cp, parts), reverse)
    results, whole = combine(chain, cp.rank * part, range(len(chain)))
    back = swap(cp, unchained(cp, results, reverse))
    own = back.movedim(0, -2).flatten(-2)[..., :channels]
    if whole is not None:
        whole = gather(cp, whole).movedim(0, -2).flatten(-2)[..., :channels]
    return own, whole


def at(chain: Tensor, places: Sequence[int]) -> Tensor:
    """The rows of a chain, without an index that would have to be on the device."""
    if list(places) == list(range(len(chain))):
        return chain
    return torch.stack([chain[i] for i in places])


def of_channels(tensor: Tensor, first: int, count: int) -> Tensor:
    """`count` channels from `first` on, with zeros past their end."""
    part = tensor[..., min(first, tensor.shape[-1]) : first + count]
    return F.pad(part, (0, count - part.shape[-1]))


def in_rows(cp: ContextParallel, tensor: Tensor | None) -> Tensor | None:
    """(batch, length, ...) with each piece as a row: (batch * pieces, length / pieces, ...). A row
    of packed sequences stays one."""
    if tensor is not None and cp.layout == "zigzag" and cp.cu_seqlens is None:
        tensor = torch.unflatten(tensor, 1, (2, tensor.shape[1] // 2)).flatten(0, 1)
    return tensor


def piece_length(cp: ContextParallel, length: int) -> int:
    if cp.layout == "zigzag" and length % 2:
        fail(f"length must be two pieces of equal length on each rank with zigzag; got {length}")
    return length // pieces(cp)


def by_piece(cp: ContextParallel, states: Tensor) -> Tensor:
    """(rows of the local call, ...) to (pieces, batch or sequences, ...)."""
    rows = states.shape[0] // pieces(cp)
    if cp.cu_seqlens is not None:
        return torch.unflatten(states, 0, (pieces(cp), rows))
    return torch.unflatten(states, 0, (rows, pieces(cp))).transpose(0, 1)


def by_row(cp: ContextParallel, states: Tensor) -> Tensor:
    """The inverse of by_piece."""
    return (states if cp.cu_seqlens is not None else states.transpose(0, 1)).flatten(0, 1)


def sharded_call(
    op: str,
    cp: ContextParallel,
    wants_final: bool,
    arguments: Sequence[Any],
    forward: Forward,
    saving: Forward,
    backward: Backward,
) -> tuple[Tensor, Tensor]:
    """y and final_state by forward(cp, arguments, wants_final) -> y, final_state, ...; where there
    is a backward by saving, whose further results are its `kept`: backward(cp, arguments, kept,
    dy, dfinal_state, wants_final) -> the gradients of the tensors. `arguments` are the operator's;
    forward and backward take no cu_seqlens."""
    if not isinstance(cp, ContextParallel):
        raise TypeError(f"{op}: context_parallel must be a ContextParallel; got {_checks.got(cp)}")
    *tensors, cu_seqlens, flag, reverse = arguments
    if cu_seqlens is not None:
        fail(f"cu_seqlens must be given to it, the global one; got them as {op}'s argument")
    if cp.check and not torch.compiler.is_compiling():
        agree(cp, op, dict(zip(library.argument_names(op), arguments, strict=False)))
    train = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if cp.cu_seqlens is not None and len(cp.cu_seqlens) == 1:
        scan = op == "selective_scan"
        operator = getattr(torch.ops.mambablock, op)  # of no sequences
        others = {"A_is_log": False, "save_states": train} if scan else {}
        y, final_state, *_ = operator(*tensors, cp.cu_seqlens, flag, reverse, **others)
    elif train:
        given = (cp, wants_final, *tensors, flag, reverse)
        y, final_state = _Sharded.apply(saving, backward, *given)  # type: ignore[no-untyped-call]
    else:
        y, final_state, *_ = forward(cp, (*tensors, flag, reverse), wants_final)
    return y, final_state


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        saving: Forward,
        backward: Backward,
        cp: ContextParallel,
        wants_final: bool,
        *arguments: Any,
    ) -> Any:
        y, final_state, *kept = saving(cp, arguments, wants_final)
        ctx.call_backward, ctx.cp, ctx.wants_final = backward, cp, wants_final
        *tensors, flag, reverse = arguments
        ctx.flags, ctx.count = (flag, reverse), len(tensors)
        ctx.materialize_grads = False
        ctx.save_for_backward(*tensors, *kept)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        arguments, kept = (*tensors[: ctx.count], *ctx.flags), tensors[ctx.count :]
        gradients = ctx.call_backward(ctx.cp, arguments, kept, dy, dfinal_state, ctx.wants_final)
        return (None, None, None, None, *gradients, None, None)


def agree(cp: ContextParallel, op: str, arguments: dict[str, Any]) -> None:
    """Raises on every rank where the ranks' calls differ in more than the lengths of shards."""
    mine: dict[str, Any] = {"layout": cp.layout}
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor):
            mine[name] = tensor if isinstance(tensor, bool) else None
            continue
        shape = [
            "length" if dim == 1 and name in ("x", "u", "delta", "B", "C", "z") else size
            for dim, size in enumerate(tensor.shape)
        ]
        mine[name] = f"{tensor.dtype} ({', '.join(map(str, shape))})"
    mine["cu_seqlens"] = None if cp.cu_seqlens is None else cp.cu_seqlens.tolist()
    calls: list[Any] = [None] * cp.size
    dist.all_gather_object(calls, mine, group=cp.group)
    for name, value in calls[0].items():
        others = [rank for rank, call in enumerate(calls) if call.get(name) != value]
        if others:
            fail(
                f"{op}'s {name} must be the same on every rank; got {value} on rank 0 and "
                f"{calls[others[0]].get(name)} on {', '.join(f'rank {r}' for r in others)}"
            )
