# SPDX-License-Identifier: Apache-2.0
"""A Mamba language model (Gu & Dao 2023, arXiv:2312.00752, section 4.2)."""

from torch import Tensor, nn

from mambablock import MambaBlock, MambaState, linear


class MambaLM(nn.Module):
    """Embedding, residual RMSNorm + MambaBlock layers, and an output head tied to the embedding."""

    def __init__(self, vocab_size: int, d_model: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(layers))
        self.blocks = nn.ModuleList(MambaBlock(d_model, layer_idx=i) for i in range(layers))
        self.final_norm = nn.RMSNorm(d_model)

    def forward(
        self, tokens: Tensor, states: list[MambaState] | None = None
    ) -> tuple[Tensor, list[MambaState]]:
        """Tokens (batch, length) int64 to logits (batch, length, vocab_size) and new states."""
        x, after = self.embedding(tokens), []
        for i, (norm, block) in enumerate(zip(self.norms, self.blocks, strict=True)):
            y, state = block(norm(x), states and states[i], return_state=True)
            x = x + y
            after.append(state)
        return linear(self.final_norm(x), self.embedding.weight), after

    def step(self, token: Tensor, states: list[MambaState]) -> Tensor:
        """Token (batch,) int64 to logits (batch, vocab_size); the states advance in place."""
        x = self.embedding(token)
        for norm, block, state in zip(self.norms, self.blocks, states, strict=True):
            x = x + block.step(norm(x), state)  # type: ignore[operator]
        return linear(self.final_norm(x), self.embedding.weight)
