# SPDX-License-Identifier: Apache-2.0
"""A Mamba language model (Gu & Dao 2023, arXiv:2312.00752, section 4.2)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mambablock import MambaBlock, MambaState


class MambaLM(nn.Module):
    """Embedding, residual RMSNorm + MambaBlock layers, and an output head tied to the embedding."""

    def __init__(self, vocab_size: int, d_model: int, n_layer: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(n_layer + 1))
        self.blocks = nn.ModuleList(MambaBlock(d_model, layer_idx=i) for i in range(n_layer))
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.blocks:  # keeps the residual sum's scale the same for any depth
            block.out_proj.weight.data.div_(n_layer**0.5)

    def forward(
        self, tokens: Tensor, states: Sequence[MambaState] | None = None
    ) -> tuple[Tensor, list[MambaState]]:
        """Tokens (batch, length) int64 -> logits (batch, length, vocab_size), the states after.

        `states`, one a layer, carry the context from an earlier call, with gradients; None is
        the start of a text.
        """
        x, after = self.embedding(tokens), []
        given = states or [None] * len(self.blocks)
        for norm, block, state in zip(self.norms, self.blocks, given):  # the last norm is the head's
            y, state = block(norm(x), state, return_state=True)
            x = x + y
            after.append(state)
        return self._head(x), after

    def step(self, token: Tensor, states: Sequence[MambaState]) -> Tensor:
        """Token (batch,) int64 -> logits (batch, vocab_size); `states` move on in place."""
        x = self.embedding(token)
        for norm, block, state in zip(self.norms, self.blocks, states):
            x = x + block.step(norm(x), state)
        return self._head(x)

    def _head(self, x: Tensor) -> Tensor:
        return F.linear(self.norms[-1](x), self.embedding.weight)
