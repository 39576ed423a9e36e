# SPDX-License-Identifier: Apache-2.0
"""Generate with a random transformers model of state-spaces/mamba-130m's shape, unpatched and
patched, side by side."""

import time
from itertools import pairwise
from statistics import median
from typing import Annotated

import torch
import transformers
import typer
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from mambablock.integrations.transformers import patched

RUNS = 3


class Clock(BaseStreamer):
    """The times at which generate has the prompt and then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def generate(
    model: transformers.PreTrainedModel, prompt: Tensor, count: int
) -> tuple[Tensor, list[float]]:
    """Greedy tokens (batch, length + count), and the seconds that each of them took."""
    clock = Clock()
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        streamer=clock,
    )
    return tokens, [after - before for before, after in pairwise(clock.times)]


def measure(model: transformers.PreTrainedModel, prompt: Tensor, count: int) -> tuple[Tensor, str]:
    """Greedy tokens, and a line of the table: medians over the runs, and over all their tokens."""
    generate(model, prompt[:, :2], 2)
    first, later = [], []
    for _ in range(RUNS):
        tokens, seconds = generate(model, prompt, count)
        first.append(seconds[0])
        later += seconds[1:]
    speed = prompt.shape[0] / median(later)
    return tokens, f"{1000 * median(first):15,.0f} ms {speed:14,.1f} tokens/s"


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
