# SPDX-License-Identifier: Apache-2.0
"""mamba-ssm's generation (version 2.3): greedy, or sampled by top-k, top-p or min-p."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

__all__ = ["GenerationMixin", "InferenceParams", "decode", "sample"]


@dataclass
class InferenceParams:
    """What a model keeps between calls: its layers' states, and how many steps they have seen."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Start new sequences; the states stay where they are."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """In place: -inf where a logit is below min_p; outside of (0, 1) it changes nothing."""
    if 0.0 < min_p < 1.0:
        logits.masked_fill_(logits < min_p, float("-inf"))


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """In place: -inf but for the top_k largest of each row."""
    least = logits.topk(top_k).values[..., -1:]
    logits.masked_fill_(logits < least, float("-inf"))


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """In place: -inf for the least likely tokens, whose probabilities sum to 1 - top_p or less."""
    if top_p <= 0.0 or top_p >= 1.0:
        return
    ascending, order = logits.sort(dim=-1)
    unlikely = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    logits.masked_fill_(unlikely.scatter(-1, order, unlikely), float("-inf"))


def modify_logit_for_repetition_penalty(
    logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0
) -> Tensor:
    """In place: the logits of earlier tokens divided by the penalty (times it where negative).

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1.
    """
    if repetition_penalty == 1.0:
        return logits
    score = logits.gather(1, prev_output_tokens)
    score = torch.where(score < 0, score * repetition_penalty, score / repetition_penalty)
    return logits.scatter_(1, prev_output_tokens, score)


def sample(
    logits: Tensor,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """The next token of each row of logits (batch, vocabulary): (batch).

    top_k = 1 takes the likeliest, top_k = 0 all into account; then top_p limits to the likeliest
    tokens of that total probability, or, where top_k is 0, min_p to those that are at least min_p
    times as likely as the likeliest.

    Raises:
        ValueError: top_p is above 1.
    """
    if top_k == 1:
        return logits.argmax(dim=-1)
    if top_p > 1.0:
        raise ValueError(f"sample: top_p must be in [0, 1]; got {top_p}")
    tokens = None
    if top_k > 0:
        logits, tokens = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    if top_k == 0 and min_p > 0.0:
        log_probabilities = logits.log_softmax(dim=-1)
        likeliest = log_probabilities.amax(dim=-1, keepdim=True)
        unlikely = (log_probabilities - likeliest).exp() < min_p
        logits = logits.masked_fill(unlikely, float("-inf")) / temperature
    else:
        logits = logits / temperature
        modify_logits_for_top_p_filtering(logits, top_p)
    drawn = torch.multinomial(logits.softmax(dim=-1), num_samples=1)
    return (drawn if tokens is None else tokens.gather(1, drawn)).squeeze(1)


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Any = None,
) -> Any:
    """Continue rows of tokens, all of one length, up to max_length or till all rows end.

    Args:
        input_ids: (batch, length).
        model: called with (input_ids, position_ids, inference_params, num_last_tokens), gives
            .logits.
        max_length: of the result, the given tokens included.
        top_k, top_p, min_p, temperature: see sample.
        repetition_penalty: see modify_logit_for_repetition_penalty.
        eos_token_id: stop where all rows have it.
        teacher_outputs: (batch, length): tokens to take instead of sampled ones, as far as they go.
        vocab_size: how many of the logits count.
        cg: changes nothing; steps are not captured in a CUDA graph.
        enable_timing: print the time taken.
        output_scores: return the logits of every step too.
        streamer: its put takes new tokens, its end is called at the end.

    Returns:
        transformers' GenerateDecoderOnlyOutput, or without transformers the like of it: sequences
        (batch, max_length or less), scores a tuple of (batch, vocabulary).
    """
    started = time.perf_counter()
    batch, length = input_ids.shape
    params = InferenceParams(max_seqlen=max_length, max_batch_size=batch)
    sequences, scores = [input_ids], []
    if streamer is not None:
        streamer.put(input_ids.cpu())
    while True:
        position_ids = None
        if params.seqlen_offset > 0:
            position_ids = input_ids.new_full((batch, 1), params.seqlen_offset, dtype=torch.long)
        logits = model(
            sequences[-1], position_ids=position_ids, inference_params=params, num_last_tokens=1
        ).logits.squeeze(1)[..., :vocab_size]
        if output_scores:
            scores.append(logits.clone())
        params.seqlen_offset += sequences[-1].shape[1]
        if repetition_penalty != 1.0:
            so_far = torch.cat(sequences, dim=1)
            logits = modify_logit_for_repetition_penalty(logits, so_far, repetition_penalty)
        if teacher_outputs is not None and params.seqlen_offset < teacher_outputs.shape[1]:
            tokens = teacher_outputs[:, params.seqlen_offset]
        else:
            tokens = sample(logits, top_k, top_p, min_p, temperature)
        sequences.append(tokens.unsqueeze(1))
        if streamer is not None:
            streamer.put(sequences[-1].cpu())
        ended = eos_token_id is not None and bool((tokens == eos_token_id).all())
        if ended or params.seqlen_offset >= max_length - 1:
            break
    if streamer is not None:
        streamer.end()
    if enable_timing:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        elapsed = 1000 * (time.perf_counter() - started)
        print(
            f"Prompt processing and decoding of {length} and {len(sequences) - 1} tokens: "
            f"{elapsed:.0f} ms"
        )
    return _output()(sequences=torch.cat(sequences, dim=1), scores=tuple(scores))


class GenerationMixin:
    """Gives a model `generate`."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        raise NotImplementedError

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        """decode's sequences, or all that it returns if return_dict_in_generate."""
        output = decode(
            *(input_ids, self, max_length, top_k, top_p, min_p, temperature),
            output_scores=output_scores,
            **kwargs,
        )
        if not output_scores:
            output.scores = None
        return output if return_dict_in_generate else output.sequences


def _output() -> Any:
    try:
        import transformers.generation as generation
    except ImportError:
        return SimpleNamespace
    return generation.GenerateDecoderOnlyOutput  # type: ignore[attr-defined]
