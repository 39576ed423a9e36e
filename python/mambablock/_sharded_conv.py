# SPDX-License-Identifier: Apache-2.0
"""The causal convolution of a sequence whose length lies over ranks.

A piece's initial state is its halo, the d_conv - 1 inputs before it, which may lie in several
pieces. All exchange their last inputs; back come the gradients of the halos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library as library
from ._chain import Chain, chain_from, chain_of, every_piece, selected
from ._context_parallel import (
    Combined,
    ContextParallel,
    at,
    by_piece,
    by_row,
    exchange,
    in_rows,
    of_channels,
    own_pieces,
    piece_length,
    pieces,
    sharded_call,
    total,
)


def _halo_steps(chain: Chain, inputs: int) -> tuple[Tensor, Tensor]:
    """The steps along the chain of each piece's halo, and of the whole row's last inputs, which are
    those before an empty piece at its end: (pieces + 1, inputs); and where the sequences start that
    these belong to (pieces + 1, 1)."""
    begin = torch.cat([chain.begin, chain.end[-1:]])
    start = torch.cat([chain.start, chain.start.new_zeros(1)])
    before = torch.arange(-inputs, 0, device=begin.device)
    return begin[:, None] + before, start[:, None]


def _last_inputs(cp: ContextParallel, x: Tensor, inputs: int, reverse: bool) -> Tensor:
    """Of each piece, in the direction of the chain, with zeros in front of a short one:
    (pieces, batch, inputs, d_inner)."""
    parts = x.unflatten(1, (pieces(cp), x.shape[1] // pieces(cp))).movedim(1, 0)
    length = parts.shape[2]
    count = min(inputs, length)
    last = parts[:, :, :count].flip(2) if reverse else parts[:, :, length - count :]
    return F.pad(last, (0, 0, inputs - count, 0))


def _add_to_last_inputs(
    cp: ContextParallel, dx: Tensor, gradients: Tensor, reverse: bool
) -> Tensor:
    """The adjoint of _last_inputs, added to dx."""
    parts = dx.unflatten(1, (pieces(cp), dx.shape[1] // pieces(cp)))
    count = min(gradients.shape[2], parts.shape[2])
    added = gradients[:, :, gradients.shape[2] - count :].movedim(0, 1)
    if reverse:
        added, at_end = added.flip(2), parts[:, :, :count]
    else:
        at_end = parts[:, :, parts.shape[2] - count :]
    ends = (at_end.to(added.dtype) + added).to(dx.dtype)
    rest = parts[:, :, count:] if reverse else parts[:, :, : parts.shape[2] - count]
    return torch.cat([ends, rest] if reverse else [rest, ends], dim=2).flatten(1, 2)


def _forward(
    cp: ContextParallel, arguments: Sequence[Any], wants_final: bool
) -> tuple[Tensor, ...]:
    """y, final_state, and what the backward needs: each local row's initial state, the chain."""
    x, weight, bias, given, silu, reverse = arguments
    inputs = weight.shape[1] - 1
    piece_length(cp, x.shape[1])
    chain = chain_of(cp, x, x.shape[1], reverse)
    packed = chain.packed
    wide = library.accumulator_dtype(x.dtype)
    rows = x.shape[0] if cp.cu_seqlens is None else len(cp.cu_seqlens) - 1
    initial = x.new_zeros((rows, inputs, x.shape[2]), dtype=wide) if given is None else given
    steps, start = _halo_steps(chain, inputs)

    def combine(last: Tensor, first: int, wanted: Sequence[int]) -> Combined:
        # (pieces, rows, inputs, channels) at each halo's steps; those of no piece come later.
        piece = torch.searchsorted(chain.end, steps, right=True).clamp(max=len(last) - 1)
        place = (piece * inputs + steps - chain.end[piece] + inputs).clamp(min=0)
        along = last.transpose(1, 2).flatten(0, 1)
        halos = along[place].transpose(1, 2)
        return at(halos[:-1], wanted), halos[-1] if wants_final and not packed else None

    last = _last_inputs(cp, x, inputs, reverse)
    halos, whole = exchange(cp, last, reverse, combine)
    own = own_pieces(cp, reverse)
    # Steps before the sequence's start are the initial state's.
    place, missing = (steps - start + inputs).clamp(0, inputs - 1), steps < start
    if packed:
        of_entering = selected(packed.entering, every_piece(cp, initial))
        states = of_entering.sum(1, keepdim=True)
    else:
        states = every_piece(cp, initial)
    halos = torch.stack(
        [
            _filled(halo.to(wide), missing[i], place[i], state)
            for i, halo, state in zip(own, halos, states, strict=True)
        ]
    )
    first_states = halos
    if packed:
        first_states = selected(packed.entering, halos, every_piece(cp, initial))
    first_states = by_row(cp, first_states).contiguous()
    y, local_last = torch.ops.mambablock.causal_conv1d(
        in_rows(cp, x),
        weight,
        bias,
        first_states,
        packed and packed.local_cu_seqlens,
        silu,
        reverse,
    )
    final_state = initial.new_empty(0)
    if wants_final and packed:
        final_state = total(cp, selected(packed.ends, by_piece(cp, local_last)).sum(0))
    elif whole is not None:
        final_state = _filled(whole.to(wide), missing[-1], place[-1], initial)
    return y.view(x.shape), final_state, first_states, *chain.tensors()


def _filled(halo: Tensor, missing: Tensor, place: Tensor, initial: Tensor) -> Tensor:
    """(rows, inputs, d_inner), with initial's inputs at `place` where steps are missing."""
    return torch.where(missing[None, :, None], initial[:, place], halo)


def _backward(
    cp: ContextParallel,
    arguments: Sequence[Any],
    kept: Sequence[Tensor],
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    wants_final: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments up to initial_state."""
    x, weight, bias, given, silu, reverse = arguments
    first_states, *links = kept
    inputs, chain = weight.shape[1] - 1, chain_from(links)
    packed = chain.packed
    dy = torch.zeros_like(x) if dy is None else dy
    own_dlast = dlast = None
    if wants_final:
        like = first_states if not packed else by_piece(cp, first_states)[0]
        shape = (x.shape[0], inputs, x.shape[2]) if not packed else like.shape
        own_dlast = like.new_zeros(shape) if dfinal_state is None else dfinal_state
        dlast = total(cp, own_dlast)
    dstates = None
    if packed and dlast is not None:
        dstates = by_row(cp, selected(packed.ends, every_piece(cp, dlast)))
    dx, dweight, dbias, dfirst = torch.ops.mambablock.causal_conv1d_backward(
        *(in_rows(cp, dy), dstates, in_rows(cp, x), weight, bias, first_states),
        *(packed and packed.local_cu_seqlens, silu, reverse),
    )
    dfirst = by_piece(cp, dfirst)
    dhalos = selected(packed.entering, dfirst).sum(1, keepdim=True) if packed else dfirst
    steps, start = _halo_steps(chain, inputs)
    own = own_pieces(cp, reverse)

    def combine(gradients: Tensor, first: int, wanted: Sequence[int]) -> Combined:
        count = len(gradients)
        if dlast is not None and not packed:
            end = of_channels(dlast, first, gradients.shape[-1])
            gradients = torch.cat([gradients, end[None]])
        count = len(gradients)
        # A piece's last input is in the halos of the pieces that this finds, at `place`.
        step = at(chain.end, wanted)[:, None] + torch.arange(-inputs, 0, device=x.device)
        exists = step >= at(chain.begin, wanted)[:, None]
        place = step[..., None] - steps[:count, 0]
        used = (place >= 0) & (place < inputs) & (step[..., None] >= start[:count, 0])
        used = used & exists[..., None]
        which = torch.arange(count, device=x.device).expand(place.shape)
        found = gradients.transpose(1, 2)[which, place.clamp(0, inputs - 1)]
        found = found.masked_fill(~used[..., None, None], 0).sum(2)
        return found.transpose(1, 2), None

    dlast_inputs, _ = exchange(cp, dhalos, reverse, combine)
    dx = _add_to_last_inputs(cp, dx.view(x.shape), dlast_inputs, reverse)
    dinitial = None
    if given is not None:
        # An initial state's inputs are in the halos of the pieces near its sequence's start.
        dinitial = torch.stack(
            [_shifted(dhalos[k], chain.begin[i] - chain.start[i]) for k, i in enumerate(own)]
        )
        if packed:
            dinitial = selected(packed.entering, dinitial, dfirst)
        dinitial = dinitial.sum(0)
        if own_dlast is not None and not packed:
            dinitial = dinitial + _shifted(own_dlast, chain.end[-1])
    return dx, dweight, None if bias is None else dbias, dinitial


def _shifted(dhalo: Tensor, by: Tensor) -> Tensor:
    """The gradient of the inputs `by` steps before those of a halo (rows, inputs, d_inner)."""
    place = torch.arange(dhalo.shape[1], device=dhalo.device) - by
    moved = dhalo[:, place.clamp(min=0)]
    return moved.masked_fill((place < 0)[None, :, None], 0)


_prepare = library.prepared("causal_conv1d", ("x",))


def causal_conv1d(cp: ContextParallel, wants_final: bool, *arguments: Any) -> tuple[Tensor, Tensor]:
    """As the operator, of the shards that `cp` describes; final_state is only there if wanted."""
    prepared = _prepare(*arguments)
    x, weight, bias, initial, *_ = prepared
    if weight.dim() == 2 and weight.shape[1] == 1:  # no step needs another
        y, _ = torch.ops.mambablock.causal_conv1d(x, weight, bias, None, None, *prepared[-2:])
        if initial is None:
            rows = x.shape[0] if cp.cu_seqlens is None else len(cp.cu_seqlens) - 1
            dtype = library.accumulator_dtype(x.dtype)
            initial = x.new_empty((rows, 0, x.shape[2]), dtype=dtype)
        return y, initial
    return sharded_call("causal_conv1d", cp, wants_final, prepared, _forward, _forward, _backward)
