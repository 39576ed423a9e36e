# SPDX-License-Identifier: Apache-2.0
"""compat's norms, language model and generation, and what mamba-ssm itself has pickled."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambablock.compat.mamba_ssm.models.config_mamba import MambaConfig
from mambablock.compat.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel, create_block
from mambablock.compat.mamba_ssm.ops.triton import layer_norm, layernorm
from mambablock.compat.mamba_ssm.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_ref,
)
from mambablock.compat.mamba_ssm.utils.generation import InferenceParams, decode, sample
from other_packages import TRITON_STAND_IN, run_program

# Float64 sums in another order.
assert_same = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# Norms


def norm_by_hand(x: Tensor, weight: Tensor, bias: Tensor | None, rms: bool) -> Tensor:
    centred = x if rms else x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("given", ["x", "residual", "x1", "rowscale"])
def test_norms(given: str, rms: bool) -> None:
    x, weight, bias, other = random(2, 3, 8), random(8), random(8), random(2, 3, 8)
    second = {"weight1": random(8), "bias1": random(8)}
    options: dict[str, Any] = {} if given == "x" else {given: other}
    total = x if given == "x" else x + other
    if given == "rowscale":
        options["rowscale"] = other[..., 0]
        total = x * other[..., :1]
    function = rms_norm_fn if rms else layer_norm_fn
    reference = rms_norm_ref if rms else layer_norm_ref
    y, y1, kept = function(x, weight, bias, **options, **second, prenorm=True)
    assert_same(y, norm_by_hand(total, weight, bias, rms))
    assert_same(y1, norm_by_hand(total, second["weight1"], second["bias1"], rms))
    assert_same(kept, total)
    assert_same(reference(x, weight, bias, **options, **second, prenorm=True), (y, y1, kept))
    assert_same(function(x, weight, None, **options), norm_by_hand(total, weight, None, rms))
    y, kept = layer_norm_linear_fn(
        *(x, weight, bias, bias[None] * weight[:, None], bias),
        **({"residual": other} if given == "residual" else {}),
        prenorm=True,
        is_rms_norm=rms,
    )
    if given in ("x", "residual"):
        linear = F.linear(
            norm_by_hand(total, weight, bias, rms), bias[None] * weight[:, None], bias
        )
        assert_same((y, kept), (linear, total))


def test_norms_in_bfloat16_keep_a_float32_residual() -> None:
    x, residual = random(4, 8).bfloat16(), random(4, 8).float()
    weight = random(8).bfloat16()
    y, kept = rms_norm_fn(x, weight, None, residual=residual, prenorm=True)
    assert (y.dtype, kept.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(kept, residual + x.float())
    _, kept = rms_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=True)
    assert kept.dtype is torch.float32
    _, kept = rms_norm_fn(x, weight, None, prenorm=True)
    assert kept.dtype is torch.bfloat16


def test_dropout_masks() -> None:
    x, weight = torch.rand(50, 40) + 1, torch.ones(40)
    y, kept, mask, mask1 = layer_norm_fn(
        x, weight, None, dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    assert mask1 is None
    # Of 2,000 drawn; four standard deviations.
    assert abs(mask.float().mean().item() - 0.75) < 0.04
    torch.testing.assert_close(kept, torch.where(mask, x / 0.75, 0.0))
    torch.testing.assert_close(
        y, layer_norm_ref(x, weight, None, dropout_p=0.25, dropout_mask=mask)
    )
    norm = RMSNorm(40, dropout_p=0.5)
    assert not torch.equal(norm(x), norm(x))
    assert torch.equal(norm.eval()(x), norm(x))


def test_bad_norms() -> None:
    x, weight = torch.randn(2, 3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"^rms_norm_fn: residual must be \(2, 3, 8\) as x; got"):
        rms_norm_fn(x, weight, None, residual=x[0])
    with pytest.raises(ValueError, match=r"^layer_norm_fn: rowscale must be None with x1; got \(2"):
        layer_norm_fn(x, weight, None, x1=x, rowscale=x[..., 0])
    assert layernorm.rms_norm_fn is layer_norm.rms_norm_fn


# The language model

CONFIG = {"d_model": 24, "n_layer": 2, "vocab_size": 61, "ssm_cfg": {"d_state": 4}}


def make_model(**options: Any) -> MambaLMHeadModel:
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(**CONFIG | {"tie_embeddings": False} | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fused_add_norm": False},
        {"rms_norm": False},
        {"d_intermediate": 40},
        {"vocab_size": 64},
    ],
    ids=str,
)
def test_generation_is_the_whole_model(options: dict[str, Any]) -> None:
    model, tokens = make_model(**options), torch.randint(1, 61, (2, 5))
    output = model.generate(tokens, max_length=12, return_dict_in_generate=True, output_scores=True)
    logits = model(output.sequences.clone()).logits
    assert logits.shape == (2, 12, 64)
    # Float32 sums of two layers in another order.
    assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    assert_close(torch.stack(output.scores, dim=1), logits[:, 4:-1])
    assert torch.equal(output.sequences[:, 5:], logits[:, 4:-1].argmax(-1))
    assert len(set(output.sequences[0].tolist())) > 3


def test_options_of_generation() -> None:
    model, tokens = make_model(), torch.randint(1, 61, (2, 5))
    plain = model.generate(tokens, max_length=12)
    assert model.generate(tokens, max_length=12, vocab_size=10)[:, 5:].max() < 10
    teacher = torch.randint(1, 61, (2, 9))
    forced = decode(tokens, model, 12, teacher_outputs=teacher).sequences
    assert torch.equal(forced[:, 5:9], teacher[:, 5:])
    eos = plain[0, 6].item()
    ended = model.generate(tokens[:1], max_length=12, eos_token_id=eos)
    assert ended.shape == (1, 5 + plain[0, 5:].tolist().index(eos) + 1)
    penalised = model.generate(tokens, max_length=20, repetition_penalty=1e9)
    assert all(len(set(row.tolist())) == 15 for row in penalised[:, 5:])


def test_sampling() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02])
    logits = probabilities.log().repeat(4000, 1)

    def drawn(**options: Any) -> Tensor:
        return torch.bincount(sample(logits, **options), minlength=5) / 4000

    assert torch.equal(drawn(top_k=1), torch.tensor([1.0, 0, 0, 0, 0]))
    for options, kept in (
        ({"top_k": 0}, 5),
        ({"top_k": 3}, 3),
        ({"top_k": 0, "top_p": 0.7}, 2),
        ({"top_k": 4, "top_p": 0.85}, 3),
        ({"top_k": 0, "min_p": 0.2}, 3),
    ):
        expected = probabilities.clone()
        expected[kept:] = 0
        # Of 4,000 draws; four standard deviations.
        torch.testing.assert_close(drawn(**options), expected / expected.sum(), atol=0.033, rtol=0)
    hot = drawn(top_k=0, temperature=2.0)
    torch.testing.assert_close(
        hot, probabilities.sqrt() / probabilities.sqrt().sum(), atol=0.033, rtol=0
    )
    with pytest.raises(ValueError, match=r"^sample: top_p must be in \[0, 1\]; got 1.5"):
        sample(logits, top_k=2, top_p=1.5)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, tokens = make_model(), torch.randint(1, 61, (2, 5))
    model.save_pretrained(str(tmp_path / "new"))
    loaded = MambaLMHeadModel.from_pretrained(str(tmp_path / "new"))
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    low = MambaLMHeadModel.from_pretrained(str(tmp_path / "new"), dtype=torch.bfloat16)
    assert low.lm_head.weight.dtype is torch.bfloat16
    assert low.backbone.layers[0].mixer.A_log.dtype is torch.float32


def test_initial_weights_and_ties() -> None:
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(**CONFIG, d_intermediate=8))
    assert model.lm_head.weight is model.backbone.embedding.weight
    mixer = model.backbone.layers[0].mixer
    assert mixer.dt_proj.bias.any()  # kept, by its mark
    bound = 48**-0.5
    assert 0.5 * bound < mixer.out_proj.weight.abs().max() <= bound / 2**0.5
    assert model.allocate_inference_cache(3, 9)[1][0].shape == (3, 48, 4)
    assert InferenceParams(8, 2).key_value_memory_dict == {}


@pytest.mark.parametrize("options", [{"ssm_cfg": {"layer": "Mamba2"}}, {"attn_layer_idx": [0]}])
def test_other_layers(options: dict[str, Any]) -> None:
    with pytest.raises(
        ImportError, match=r"^create_block: a layer must be Mamba1, all that mambab"
    ):
        create_block(8, 0, layer_idx=0, **options)


PICKLE = (
    TRITON_STAND_IN
    + """
import mambablock.compat
mambablock.compat.install()  # gives it the extensions that it imports
import torch, sys
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
assert "mambablock" not in MambaLMHeadModel.__module__
torch.manual_seed(0)
config = MambaConfig(d_model=24, n_layer=2, vocab_size=61, d_intermediate=40)
torch.save(MambaLMHeadModel(config), sys.argv[1])
"""
)
UNPICKLE = """
import mambablock.compat
mambablock.compat.install()
import torch, sys
model = torch.load(sys.argv[1], weights_only=False)
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
assert type(model) is MambaLMHeadModel and "mambablock" in type(model).__module__
fresh = MambaLMHeadModel(model.config)
fresh.load_state_dict(model.state_dict())
tokens = torch.randint(1, 61, (2, 5))
assert torch.equal(model(tokens).logits, fresh(tokens).logits)
assert torch.equal(model.generate(tokens, 9), fresh.generate(tokens, 9))
model(tokens).logits.sum().backward()
print("same")
"""


def test_a_model_that_mamba_ssm_pickled(tmp_path: Path) -> None:
    pytest.importorskip("einops", reason="mamba-ssm needs einops")
    path = str(tmp_path / "model.pt")
    run_program(PICKLE, path, packages=("mamba-ssm",))
    assert run_program(UNPICKLE, path) == "same\n"
