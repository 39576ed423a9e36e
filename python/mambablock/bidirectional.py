# SPDX-License-Identifier: Apache-2.0
"""Two Mamba blocks that run in opposite directions of time, and their sum or the like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _checks as check
from ._block_checks import check_sequences
from ._layers import in_scan_dtype
from .block import MambaBlock
from .causal_conv1d import causal_conv1d
from .selective_scan import selective_scan

__all__ = ["BidirectionalMambaBlock"]

_projections = ("in_proj", "out_proj")
_convolution = (*_projections, "conv1d", "x_proj", "dt_proj", "D")
_shared = {
    "nothing": (),
    "projections": _projections,
    "convolution": _convolution,
    "everything": (*_convolution, "A_log"),
}


class BidirectionalMambaBlock(nn.Module):
    """Both directions of time, each a MambaBlock: `mamba_fwd`, and `mamba_rev` in reverse.

    The second runs backward through the same memory; nothing is flipped. As others have it:

    - Vision Mamba v2 (Zhu et al. 2024, arXiv:2401.09417): share="projections", merge="add";
    - its v1: share="convolution", merge="add";
    - Caduceus (Schiff et al. 2024, arXiv:2403.03234), whose state_dict keys these are:
      share="projections" or "nothing", merge="add" or "multiply";
    - SEMamba (Chao et al. 2024, arXiv:2405.06573): share="nothing", merge="concatenate".

    Args:
        d_model: width of the input, and of the output unless merge is "concatenate".
        share: what both directions have in common: "nothing"; "projections", in_proj and out_proj;
            "convolution", all but A_log, and one convolution, forward in time, whose output both
            scans read; or "everything", one block in both directions.
        merge: "add" or "multiply" the directions' outputs, or "concatenate" them to twice d_model.
        options: of :class:`mambablock.MambaBlock`.

    Raises:
        TypeError, ValueError: as from MambaBlock; share or merge is an unknown word.
    """

    def __init__(
        self, d_model: int, *, share: str = "projections", merge: str = "add", **options: Any
    ) -> None:
        super().__init__()
        merges = ("add", "multiply", "concatenate")
        for name, value, known in (("share", share, _shared), ("merge", merge, merges)):
            if value not in known:
                expected = ", ".join(map(repr, known))
                got = check.got(value)
                raise ValueError(f"{type(self).__name__}: {name} must be of {expected}; got {got}")
        self.share, self.merge = share, merge
        self.mamba_fwd = MambaBlock(d_model, **options)
        self.mamba_rev = MambaBlock(d_model, **options)
        for name in _shared[share]:
            setattr(self.mamba_rev, name, getattr(self.mamba_fwd, name))

    def forward(self, hidden_states: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Run both directions over whole sequences.

        Args:
            hidden_states: (batch, length, d_model), of the parameters' type.
            cu_seqlens: as in MambaBlock.forward, to pack sequences into one row.

        Returns:
            (batch, length, d_model), or (batch, length, 2 * d_model) if merge is "concatenate".

        Raises:
            TypeError, ValueError, RuntimeError: as from MambaBlock.forward.
        """
        fwd, rev = self.mamba_fwd, self.mamba_rev
        check_sequences(fwd, hidden_states, None, None, cu_seqlens)
        xz = fwd.in_proj(hidden_states)
        if self.share == "convolution":
            y, y_rev = self._scans(xz, cu_seqlens)
        else:
            xz_rev = xz if rev.in_proj is fwd.in_proj else rev.in_proj(hidden_states)
            y = self._mixed(fwd, xz, cu_seqlens, False)
            y_rev = self._mixed(rev, xz_rev, cu_seqlens, True)
        merged: Tensor
        if self.merge == "add" and rev.out_proj is fwd.out_proj:
            merged = fwd.out_proj(y + y_rev)
            return merged
        y, y_rev = (block.out_proj(t) for block, t in ((fwd, y), (rev, y_rev)))
        if self.merge == "concatenate":
            return torch.cat([y, y_rev], dim=-1)
        merged = y + y_rev if self.merge == "add" else y * y_rev
        return merged

    @staticmethod
    def _mixed(block: MambaBlock, xz: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
        inputs, z = xz.chunk(2, dim=-1)
        return block._mix(inputs, z, None, None, None, cu_seqlens, reverse)[0]

    def _scans(self, xz: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scans in both directions of one convolution, each with its own A."""
        fwd = self.mamba_fwd
        inputs, z = xz.chunk(2, dim=-1)
        weight, bias = fwd.conv1d.weight.squeeze(1), fwd.conv1d.bias
        x = causal_conv1d(inputs, weight, bias=bias, silu=True, cu_seqlens=cu_seqlens)
        delta, delta_bias, B, C = fwd._selection(x)
        y, y_rev = (
            selective_scan(
                *(x, delta, block._A(), B, C),
                D=in_scan_dtype(fwd.D),
                z=z,
                delta_bias=delta_bias,
                delta_softplus=True,
                cu_seqlens=cu_seqlens,
                reverse=reverse,
            )
            for block, reverse in ((fwd, False), (self.mamba_rev, True))
        )
        return y, y_rev
