# SPDX-License-Identifier: Apache-2.0
"""The selective scan of a sequence whose length lies over ranks.

A piece maps the state that enters it to exp(A S) h + b, where S is its sum of dt and b its final
state from an initial one of 0. These maps compose along the chain of pieces to the state that
enters each, and then one ordinary scan does the rest. The backward does the same from the other
end, with the gradient of a piece's initial state from a final one of 0 in b's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _library as library
from . import selective_scan_carry
from ._chain import Chain, chain_from, chain_of, every_piece, picked, selected
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
    sharded_call,
    total,
)


def decayed(state: Tensor, exponent: Tensor) -> Tensor:
    """exp(exponent) * state by two factors, which overflow or vanish only where the product does;
    zeros and infinities stay, as they do in single steps."""
    factor = torch.exp(0.5 * exponent)
    stays = ((state == 0) | state.isinf()) & ~exponent.isnan()
    return torch.where(stays, state, state * factor * factor)


def composed(state: Tensor, dt_sum: Tensor, A: Tensor, forgets: Tensor | None) -> Tensor:
    """The state after each piece of a chain, by ceil(log2(pieces)) steps (Hillis & Steele 1986).

    Args:
        state: (pieces, rows, d_state, channels), each piece's own final state.
        dt_sum: (pieces, rows, 1, channels).
        A: (d_state, channels).
        forgets: (pieces), where nothing passes; selected, so that no NaN does.
    """
    step = 1
    while step < len(state):
        carried = decayed(state[:-step], A * dt_sum[step:])
        if forgets is not None:
            carried = carried.masked_fill(forgets[step:, None, None, None], 0)
            forgets = torch.cat([forgets[:step], forgets[step:] | forgets[:-step]])
        state = torch.cat([state[:step], state[step:] + carried])
        dt_sum = torch.cat([dt_sum[:step], dt_sum[step:] + dt_sum[:-step]])
        step *= 2
    return state


class _Pass:
    """One call's arguments in the rows of the local one, and what is known of the chain."""

    def __init__(
        self, cp: ContextParallel, arguments: Sequence[Any], chain: Chain | None = None
    ) -> None:
        self.cp, self.chain = cp, chain
        u, delta, self.A, B, C, self.D, z, self.delta_bias, *_ = arguments
        *_, self.softplus, self.reverse = arguments
        piece_length(cp, u.shape[1])
        if chain is None and (cp.cu_seqlens is not None or cp.layout == "zigzag"):
            self.chain = chain_of(cp, u, u.shape[1], self.reverse)
        self.packed = self.chain and self.chain.packed
        self.local_cu_seqlens = self.packed and self.packed.local_cu_seqlens
        self.u, self.delta, self.B, self.C, self.z = (in_rows(cp, t) for t in (u, delta, B, C, z))
        self.own = own_pieces(cp, self.reverse)
        self.wide_A = self.A.to(library.accumulator_dtype(u.dtype))

    def scan_arguments(self, first_states: Tensor) -> tuple[Any, ...]:
        tensors = (self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias)
        flags = (self.softplus, self.reverse, False)  # A is none of A_log
        return (*tensors, first_states, self.local_cu_seqlens, *flags)

    def exponents(self, dt_sum: Tensor) -> Tensor:
        """Of the decay: (..., 1) to (..., d_inner, d_state)."""
        exponents: Tensor = self.wide_A * dt_sum
        return exponents

    def A_of(self, first: int, channels: int) -> Tensor:
        """A of a part of the channels, transposed."""
        return of_channels(self.wide_A.t(), first, channels)


def _forward(
    cp: ContextParallel, arguments: Sequence[Any], wants_final: bool, save: bool = False
) -> tuple[Tensor, ...]:
    """y, final_state, and what the backward needs: the saved states, each local row's initial
    state, the chain's sums of dt and the rows' own, and the chain."""
    p = _Pass(cp, arguments)
    packed, own = p.packed, p.own
    carry, dt_sum = selective_scan_carry.forward(
        *(p.u, p.delta, p.A, p.B, p.delta_bias, p.local_cu_seqlens, p.softplus, p.reverse)
    )
    carry, dt_sum = by_piece(cp, carry), by_piece(cp, dt_sum[..., None])
    given = arguments[8]
    initial = carry.new_zeros(carry.shape[1:]) if given is None else given
    # What leaves each of this rank's pieces, but for what came from the piece before.
    leaving, leaving_dt = carry, dt_sum
    if packed:
        leaving, leaving_dt = picked(carry, packed.leaving), picked(dt_sum, packed.leaving)
        if given is not None:
            started = picked(every_piece(cp, given), packed.leaving)
            started = decayed(started, p.exponents(leaving_dt))
            leaving = leaving + selected(packed.starts[:, None], started)
    elif given is not None and 0 in own:
        started = decayed(given, p.exponents(dt_sum[own.index(0)]))
        leaving = torch.stack(
            [left + started if i == 0 else left for i, left in zip(own, carry, strict=True)]
        )
    d_state, chain_dt = p.A.shape[1], [dt_sum]

    def combine(summaries: Tensor, first: int, wanted: Sequence[int]) -> Combined:
        state, chain_dt[0] = summaries.split([d_state, 1], dim=-2)
        forgets = packed and packed.forgets
        after = composed(state, chain_dt[0], p.A_of(first, state.shape[-1]), forgets)
        before = torch.cat([torch.zeros_like(after[:1]), after[:-1]])
        return at(before, wanted), after[-1] if wants_final and not packed else None

    summary = torch.cat([leaving, leaving_dt], dim=-1).transpose(-1, -2)
    entering, whole = exchange(cp, summary, p.reverse, combine)
    entering = entering.transpose(-1, -2)
    if packed:
        first_states = selected(packed.entering, entering, every_piece(cp, initial))
    else:
        first_states = torch.stack(
            [initial if i == 0 else state for i, state in zip(own, entering, strict=True)]
        )
    first_states = by_row(cp, first_states).contiguous()
    y, last, saved = torch.ops.mambablock.selective_scan(*p.scan_arguments(first_states), save)
    if packed and wants_final:
        final_state = total(cp, selected(packed.ends, by_piece(cp, last)).sum(0))
    elif whole is not None:
        final_state = whole.transpose(-1, -2).contiguous()
    else:
        final_state = carry.new_empty(0)
    links = p.chain.tensors() if p.chain else ()
    return y.view(arguments[0].shape), final_state, saved, first_states, chain_dt[0], dt_sum, *links


def _backward(
    cp: ContextParallel,
    arguments: Sequence[Any],
    kept: Sequence[Tensor],
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    wants_final: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments up to initial_state."""
    saved, first_states, chain_dt, dt_sum, *links = kept
    p = _Pass(cp, arguments, chain_from(links) if links else None)
    packed = p.packed
    dy = torch.zeros_like(arguments[0]) if dy is None else dy
    dy = in_rows(cp, dy)
    carry = selective_scan_carry.backward(
        *(dy, p.delta, p.A, p.C, p.z, p.delta_bias, p.local_cu_seqlens, p.softplus, p.reverse)
    )
    carry = by_piece(cp, carry)
    dlast = carry.new_zeros(carry.shape[1:])
    if wants_final:
        dlast = total(cp, dlast if dfinal_state is None else dfinal_state)
    if packed:
        # Of the sequences that end in each piece.
        dlast = selected(packed.ends, every_piece(cp, dlast))
        carry = carry + decayed(dlast, p.exponents(dt_sum))
        carry = selected(packed.entering, carry).sum(1, keepdim=True)

    def combine(gradients: Tensor, first: int, wanted: Sequence[int]) -> Combined:
        channels = gradients.shape[-1]
        end = torch.zeros_like(gradients[:1])
        if wants_final and not packed:
            end = end + of_channels(dlast.transpose(-1, -2), first, channels)
        # The chain from its end: the gradient of what leaves it, then that of what enters each.
        along = torch.cat([end, gradients.flip(0)])
        dt = torch.cat([torch.zeros_like(chain_dt[:1]), chain_dt.flip(0)])
        forgets = None
        if packed:
            forgets = torch.cat([torch.zeros_like(packed.forgets[:1]), packed.forgets.flip(0)])
        after = composed(along, dt, p.A_of(first, channels), forgets)
        return at(after[:-1].flip(0), wanted), None

    leaving, _ = exchange(cp, carry.transpose(-1, -2), p.reverse, combine)
    leaving = leaving.transpose(-1, -2)
    if packed:
        leaving = selected(packed.leaves, leaving, dlast)
    dstates = by_row(cp, leaving).contiguous()
    *found, dfirst = torch.ops.mambablock.selective_scan_backward(
        dy, dstates, saved, *p.scan_arguments(first_states)
    )
    dfirst = by_piece(cp, dfirst)
    if packed:
        dinitial = selected(~packed.entering, dfirst).sum(0)
    else:
        dinitial = dfirst[p.own.index(0)] if 0 in p.own else torch.zeros_like(dfirst[0])
    gradients = [
        None if argument is None else gradient.view(argument.shape)
        for argument, gradient in zip(arguments, (*found, dinitial), strict=False)
    ]
    return tuple(gradients)


_prepare = library.prepared("selective_scan", ("u", "delta", "B", "C", "z"))


def selective_scan(
    cp: ContextParallel, wants_final: bool, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """As the operator, of the shards that `cp` describes; final_state is only there if wanted."""
    u, delta, A, *others, A_is_log = _prepare(*arguments)
    if A_is_log:
        A = -torch.exp(A.to(library.accumulator_dtype(u.dtype)))
    prepared = (u, delta, A, *others)
    return sharded_call(
        "selective_scan",
        cp,
        wants_final,
        prepared,
        _forward,
        partial(_forward, save=True),
        _backward,
    )
