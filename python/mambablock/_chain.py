# SPDX-License-Identifier: Apache-2.0
"""Where the pieces of a sequence lie along the chain of them, and which packed sequences they have.

Time along the chain runs as the scan does. Lengths and boundaries are tensors on the activations'
device: nothing waits for their values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._context_parallel import (
    ContextParallel,
    chained,
    fail,
    gather,
    own_pieces,
    piece_length,
    pieces,
)


class Packed(NamedTuple):
    """Of packed sequences. Rows are the sequences in order of time; but for the first two, of this
    rank's pieces alone."""

    forgets: Tensor  # (all pieces): what leaves the piece started in it
    local_cu_seqlens: Tensor  # of the rank's row
    entering: Tensor  # (pieces, sequences): the sequence comes from the piece before
    leaving: Tensor  # (pieces): the row of the last sequence
    leaves: Tensor  # (pieces, sequences): the sequence goes on in the next piece
    starts: Tensor  # (pieces): the last sequence starts in the piece
    ends: Tensor  # (pieces, sequences): the piece has the sequence's last step


class Chain(NamedTuple):
    begin: Tensor  # (all pieces): the first step of each
    end: Tensor
    start: Tensor  # (all pieces): that of the sequence that enters each
    packed: Packed | None

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.begin, self.end, self.start, *(self.packed or ()))


def chain_from(tensors: list[Tensor]) -> Chain:
    """The inverse of Chain.tensors."""
    begin, end, start, *rest = tensors
    return Chain(begin, end, start, Packed(*rest) if rest else None)


def chain_of(cp: ContextParallel, like: Tensor, length: int, reverse: bool) -> Chain:
    """Exchanges the lengths of the shards; `like` is on their device."""
    shards = gather(cp, torch.full((), length, dtype=torch.int64, device=like.device))
    # Values on a device other than the CPU would have to be waited for.
    values = like.device.type == "cpu" and not torch.compiler.is_compiling()
    if values and cp.layout == "zigzag":
        first = int(shards[0])
        if first % 2 or not bool((shards == first).all()):
            fail(
                f"length must be that of two of 2 * ranks={2 * cp.size} equal pieces on every rank "
                f"with zigzag; got {shards.tolist()}"
            )
    of_piece = shards[:, None] // pieces(cp)
    if cp.layout == "zigzag":
        of_piece = of_piece.expand(-1, 2)
    lengths = chained(cp, of_piece, reverse)
    end = lengths.cumsum(0)
    begin = end - lengths
    if cp.cu_seqlens is None:
        return Chain(begin, end, torch.zeros_like(begin), None)
    if values:
        _check_cu_seqlens(cp.cu_seqlens, int(end[-1]))
    start, packed = _packed(cp, cp.cu_seqlens, begin, end, length, reverse)
    return Chain(begin, end, start, packed)


def _packed(
    cp: ContextParallel, cu_seqlens: Tensor, begin: Tensor, end: Tensor, length: int, reverse: bool
) -> tuple[Tensor, Packed]:
    """Chain.start, and which of the sequences this rank's pieces have."""
    own, last_step, lengths = own_pieces(cp, reverse), end[-1:], end - begin
    natural = cu_seqlens.to(torch.int64)
    along = last_step - natural.flip(0) if reverse else natural
    sequences = len(along) - 1
    first = (torch.searchsorted(along, begin, right=True) - 1).clamp(0, sequences - 1)
    last = (torch.searchsorted(along, end - 1, right=True) - 1).clamp(0, sequences - 1)
    holds = lengths > 0
    enters = holds & (along[first] < begin)
    forgets = holds & (along[last] >= begin)
    leaves = holds & (along[last + 1] > end)
    start = torch.where(enters, along[first], begin)

    def mine(of_all: Tensor) -> Tensor:
        return torch.stack([of_all[i] for i in own])

    def one_hot(rows: Tensor, where: Tensor) -> Tensor:
        return (torch.arange(sequences, device=rows.device) == rows[:, None]) & where[:, None]

    starts_at, ends_at = along[:-1], along[1:]
    begins, finishes = mine(begin)[:, None], mine(end)[:, None]
    # One without steps belongs to the chain's first piece.
    at_first = mine(begin.new_ones(len(begin)).cumsum(0) == 1)[:, None]
    ends = torch.where(starts_at == ends_at, at_first, (ends_at > begins) & (ends_at <= finishes))
    entering = one_hot(mine(first), mine(enters))
    leaves_as = one_hot(mine(last), mine(leaves))
    leaving = mine(last)
    if reverse:  # rows are in the order of time
        ends, entering, leaves_as = ends.flip(1), entering.flip(1), leaves_as.flip(1)
        leaving = sequences - 1 - leaving
    local, local_begin = [natural.new_zeros(1)], 0
    for place in own:
        from_step = last_step[0] - end[place] if reverse else begin[place]
        boundaries = (natural - from_step).clamp(min=0).minimum(lengths[place])
        local.append(boundaries[1:] + local_begin)
        local_begin = piece_length(cp, length)
    return start, Packed(
        forgets, torch.cat(local), entering, leaving, leaves_as, mine(forgets), ends
    )


def _check_cu_seqlens(cu_seqlens: Tensor, length: int) -> None:
    values = cu_seqlens.tolist()
    if values[-1] != length:
        fail(f"cu_seqlens must end with the global length={length}; got {values[-1]}")
    if values[0] != 0 or values != sorted(values):
        fail(f"cu_seqlens must rise from 0 to the global length={length}; got {values}")


def picked(states: Tensor, rows: Tensor) -> Tensor:
    """(pieces, sequences, ...) at each piece's row: (pieces, 1, ...)."""
    index = rows.view(-1, 1, *[1] * (states.dim() - 2)).expand(-1, 1, *states.shape[2:])
    return states.gather(1, index)


def every_piece(cp: ContextParallel, states: Tensor) -> Tensor:
    """The same states (...) for each of the rank's pieces: (pieces, ...)."""
    return states.expand(pieces(cp), *states.shape)


def selected(mask: Tensor, states: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """States (pieces, sequences, ..., ...) where mask (pieces, sequences) is set, else 0."""
    mask = mask[..., None, None]
    return (
        states.masked_fill(~mask, 0) if otherwise is None else torch.where(mask, states, otherwise)
    )
