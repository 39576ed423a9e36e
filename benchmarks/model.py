# SPDX-License-Identifier: Apache-2.0
"""A whole language model's prefill and decoding, beside transformers and llama.cpp."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from examples.model import MambaLM
from torch import Tensor

from . import llama
from .correctness import TOLERANCES, compare
from .implementations import OURS, TRANSFORMERS, importable
from .measure import interleave, keep_freed_memory
from .results import Results, Target, at_each_thread_count, dtype_name
from .settings import D_CONV, D_STATE, ModelSizes, Settings

PREFILL, DECODE = "prefill", "decode"
PATCHED, LLAMA, READ = "transformers, patched", "llama.cpp", "reading the weights"

# Of a model, tokens (batch, length) to what decoding needs; and a token (batch,) to logits.
Prefill = Callable[[Tensor], Any]
Step = Callable[[Tensor, Any], Tensor]

# Implementation, pass and batch.
Case = tuple[str, str, int]


def measure_model(settings: Settings) -> Results:
    """Tokens per second, of random weights."""
    keep_freed_memory()
    torch.manual_seed(0)
    sizes = settings.model
    model = MambaLM(sizes.vocabulary, sizes.d_model, sizes.layers).eval()
    return at_each_thread_count(partial(_model, model), settings)


@torch.inference_mode()
def _model(model: MambaLM, settings: Settings) -> Results:
    results = Results()
    for dtype in (torch.float32, torch.bfloat16):
        seconds = _seconds(copy.deepcopy(model).to(dtype), dtype, settings, results)
        for (name, passes, batch), value in seconds.items():
            values = {"pass": passes, "batch": batch, "dtype": dtype_name(dtype)}
            results.add("model", name, **values, value=1 / value, unit="tokens/s")
        _add_targets(results, seconds, dtype)
    return results


def _seconds(
    model: MambaLM, dtype: torch.dtype, settings: Settings, results: Results
) -> dict[Case, float]:
    """Of a token."""
    sizes = settings.model
    implementations = {OURS: ours(model)}
    if importable(TRANSFORMERS):
        implementations |= {
            TRANSFORMERS: theirs(model, dtype),
            PATCHED: theirs(model, dtype, patched=True),
        }
    _check(implementations, sizes, dtype)
    seconds: dict[Case, float] = {}
    for batch in sizes.batches:
        prompt = torch.randint(sizes.vocabulary, (batch, sizes.prompt))
        passes: dict[tuple[str, str], Callable[[], object]] = {}
        for name, (prefill, step) in implementations.items():
            if batch == 1:
                passes[name, PREFILL] = partial(prefill, prompt)
            passes[name, DECODE] = partial(_decode, step, prefill(prompt[:, :8]), prompt, sizes)
        timings = interleave(passes, settings)
        for name, kind in passes:
            count = batch * (sizes.prompt if kind == PREFILL else sizes.tokens)
            seconds[name, kind, batch] = timings.seconds((name, kind)) / count
    read = interleave({READ: lambda: [p.sum() for p in model.parameters()]}, settings)
    seconds[READ, DECODE, 1] = read.seconds(READ)
    if sizes.llama:
        arguments = (model, dtype, sizes.prompt, sizes.tokens, settings.rounds)
        try:
            rates = llama.tokens_per_second(*arguments)
        except llama.UnavailableError as error:
            results.notes.append(f"llama.cpp is left out: {error}")
        else:
            for kind, rate in zip((PREFILL, DECODE), rates, strict=True):
                seconds[LLAMA, kind, 1] = 1 / rate
    return seconds


def _decode(step: Step, states: Any, prompt: Tensor, sizes: ModelSizes) -> None:
    for i in range(sizes.tokens):
        step(prompt[:, i % sizes.prompt], states)


def ours(model: MambaLM) -> tuple[Prefill, Step]:
    def prefill(tokens: Tensor) -> Any:
        return model(tokens)[1]

    return prefill, model.step


def theirs(model: MambaLM, dtype: torch.dtype, *, patched: bool = False) -> tuple[Prefill, Step]:
    """transformers' model with the same weights."""
    import transformers

    from mambablock.integrations.transformers import patch

    transformers.logging.set_verbosity_error()  # it warns that its kernels are absent
    vocabulary, d_model = model.embedding.weight.shape
    config = transformers.MambaConfig(
        vocab_size=vocabulary,
        hidden_size=d_model,
        num_hidden_layers=len(model.blocks),
        state_size=D_STATE,
        conv_kernel=D_CONV,
        layer_norm_epsilon=torch.finfo(torch.float32).eps,
        residual_in_fp32=False,
    )
    other = transformers.MambaForCausalLM(config).to(dtype).eval()
    names = {"embedding": "backbone.embeddings", "final_norm": "backbone.norm_f"}
    for i in range(len(model.blocks)):
        names[f"norms.{i}"] = f"backbone.layers.{i}.norm"
        names[f"blocks.{i}"] = f"backbone.layers.{i}.mixer"
    state = {}
    for name, value in model.state_dict().items():
        prefix = next(p for p in names if name.startswith(f"{p}."))
        state[names[prefix] + name.removeprefix(prefix)] = value
    other.load_state_dict(state | {"lm_head.weight": model.embedding.weight})
    if patched:
        patch(other)

    def prefill(tokens: Tensor) -> Any:
        return other(tokens, use_cache=True, logits_to_keep=1)["cache"]

    def step(token: Tensor, cache: Any) -> Tensor:
        logits: Tensor = other(token[:, None], cache=cache, use_cache=True).logits[:, 0]
        return logits

    return prefill, step


def _check(
    implementations: dict[str, tuple[Prefill, Step]], sizes: ModelSizes, dtype: torch.dtype
) -> None:
    """That all give the same logits, of a token after a prompt."""
    tokens = torch.randint(sizes.vocabulary, (1, 12))
    logits = {
        name: step(tokens[:, -1], prefill(tokens[:, :-1]))
        for name, (prefill, step) in implementations.items()
    }
    for name, found in logits.items():
        # Rounded some hundred times, layer after layer.
        tolerance = 10 * TOLERANCES[dtype]
        compare(f"the model of {name}", found, logits[OURS], tolerance)


def _add_targets(results: Results, seconds: dict[Case, float], dtype: torch.dtype) -> None:
    name = dtype_name(dtype)

    def add(
        what: str, key: tuple[str, str, int], other: tuple[str, str, int], bound: float
    ) -> None:
        if key in seconds and other in seconds:
            figures = (seconds[key], "s", other[0], seconds[other])
            ratio = seconds[other] / seconds[key]
            results.targets.append(
                Target("model", f"{name}, {what}", *figures, ratio, bound, at_least=True)
            )

    prefill = 2.5 if dtype == torch.float32 else 5
    add("a token of prefill", (OURS, PREFILL, 1), (LLAMA, PREFILL, 1), prefill)
    add("a token of decoding", (OURS, DECODE, 1), (LLAMA, DECODE, 1), 1.4)
    add("a token of decoding, patched", (PATCHED, DECODE, 1), (LLAMA, DECODE, 1), 1.2)
    add("a token of decoding, batch 4", (OURS, DECODE, 4), (OURS, DECODE, 1), 2)
