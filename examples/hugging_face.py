# SPDX-License-Identifier: Apache-2.0
"""Generate with a random transformers model of state-spaces/mamba-130m's shape, unpatched and
patched, side by side."""

import time
from typing import Annotated

import torch
import transformers
import typer
from torch import Tensor

from mambablock.integrations.transformers import patched


def generate(
    model: transformers.PreTrainedModel, prompt: Tensor, count: int
) -> tuple[Tensor, float]:
    """Greedy tokens (batch, length + count) and the seconds that they took."""
    begin = time.perf_counter()
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
    )
    return tokens, time.perf_counter() - begin


def measure(model: transformers.PreTrainedModel, prompt: Tensor, count: int) -> tuple[Tensor, str]:
    """Greedy tokens, and a line of the table."""
    generate(model, prompt[:, :2], 2)
    _, first = generate(model, prompt, 1)
    tokens, total = generate(model, prompt, count)
    speed = prompt.shape[0] * (count - 1) / (total - first)
    return tokens, f"{1000 * first:15,.0f} ms {speed:14,.1f} tokens/s"


def main(
    layers: Annotated[int, typer.Option(min=1)] = 24,
    width: Annotated[int, typer.Option(min=1, help="d_model")] = 768,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    prompt: Annotated[int, typer.Option(min=2, help="Tokens before the first.")] = 128,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 16,
) -> None:
    """Time to first token and tokens/s on the CPU; the generated tokens are compared."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=width, num_hidden_layers=layers)
    model = transformers.MambaForCausalLM(config).eval()
    ids = torch.randint(1, config.vocab_size, (batch, prompt))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"MambaForCausalLM, random, {millions:.0f}M parameters, float32, "
        f"{torch.get_num_threads()} threads; batch {batch}, prompt {prompt}, {tokens} new tokens"
    )
    print(f"{'':12}{'first token':>18}{'then':>24}")
    before, line = measure(model, ids, tokens)
    print(f"{'unpatched':12}{line}")
    with patched(model):
        after, line = measure(model, ids, tokens)
    print(f"{'patched':12}{line}")
    same = (before == after)[:, prompt:].float().mean().item()
    print(f"{same:.0%} of the generated tokens are the same.")
    if same < 1:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
