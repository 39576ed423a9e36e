# SPDX-License-Identifier: Apache-2.0
"""Patched transformers models against the same models unpatched."""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import inspect
import pickle
import re
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from mambablock.integrations.transformers import (  # noqa: E402
    _patched_classes,
    patch,
    patched,
    unpatch,
)
from operators import Calls  # noqa: E402

# float32 sums of some hundred terms in another order.
assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5)

VOCABULARY = 97
# Tied to the embedding, a random model's head repeats the last token for ever.
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "tie_word_embeddings": False}
MAMBA = SIZES | {"num_hidden_layers": 2, "state_size": 6, "time_step_rank": 3}
JAMBA = SIZES | {
    "num_hidden_layers": 3,
    "mamba_d_state": 6,
    "mamba_dt_rank": 3,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "num_experts": 2,
    "num_experts_per_tok": 1,
}
ZAMBA = SIZES | {
    "num_hidden_layers": 3,
    "layers_block_type": ["mamba", "hybrid", "mamba"],
    "mamba_d_state": 6,
    "mamba_dt_rank": 3,
    "n_mamba_heads": 2,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
CONFIGS: dict[str, Any] = {
    "mamba": partial(transformers.MambaConfig, **MAMBA),
    "mamba with biases": partial(transformers.MambaConfig, **MAMBA, use_bias=True, conv_kernel=3),
    "falcon_mamba": partial(transformers.FalconMambaConfig, **MAMBA),
    "jamba": partial(transformers.JambaConfig, **JAMBA),
    "zamba": partial(transformers.ZambaConfig, **ZAMBA),
}


def make_model(kind: str, **options: Any) -> Any:
    """A small random model in which every parameter matters."""
    torch.manual_seed(0)
    config = CONFIGS[kind](**options)
    config.pad_token_id = 0
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def mixers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "A_log")]


def tokens(rows: int = 3, length: int = 11) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length))


def left_padding(rows: int = 3, length: int = 11) -> Tensor:
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, :4] = mask[1, :1] = 0
    return mask


def gradients(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found


@pytest.fixture(params=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_gradients(model: Any, train: bool, padded: bool) -> None:
    model.train(train)
    ids = tokens()
    inputs = {"input_ids": ids, "labels": ids}
    if padded:
        inputs["attention_mask"] = left_padding()
    expected, expected_gradients = model(**inputs).logits, gradients(model, **inputs)
    with patched(model):
        assert_close(model(**inputs).logits, expected)
        assert_close(gradients(model, **inputs), expected_gradients)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [1, 2, 11])
def test_greedy_generation(model: Any, padded: bool, length: int) -> None:
    def generate() -> Any:
        return model.generate(
            ids,
            attention_mask=left_padding()[:, -length:] if padded else torch.ones_like(ids),
            max_new_tokens=10,
            min_new_tokens=10,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )

    ids = tokens(length=length)
    if padded:
        ids[:2, 0] = 0
    expected = generate()
    with patched(model):
        got = generate()
        cached, uncached = got.logits[-1], model(got.sequences[:, :-1]).logits[:, -1]
    assert len(set(expected.sequences[0].tolist())) > 3
    assert torch.equal(got.sequences, expected.sequences)
    assert_close(torch.stack(got.logits), torch.stack(expected.logits))
    if not padded:
        assert_close(cached, uncached)


def cache_name(model: Any) -> str:
    """cache, or one of the names that it has before transformers 5.24."""
    parameters = inspect.signature(model.forward).parameters
    return next(n for n in ("cache", "cache_params", "past_key_values") if n in parameters)


@torch.no_grad()
def test_caches_are_the_same(model: Any) -> None:
    ids, name = tokens(length=12), cache_name(model)

    def cache() -> Any:
        cache = model(ids[:, :11], use_cache=True)[name]
        return model(ids[:, 11:], **{name: cache}, use_cache=True)[name]

    expected = cache()
    with patched(model):
        got = cache()
    for mixer in mixers(model):
        mine, theirs = (c.layers[mixer.layer_idx] for c in (got, expected))
        assert_close(mine.conv_states, theirs.conv_states)
        assert_close(mine.recurrent_states, theirs.recurrent_states)


def one_token(model: Any, ids: Tensor) -> Calls:
    """The operators of a step of decoding."""
    name = cache_name(model)
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True)[name]
        with Calls() as calls:
            model(ids[:, -1:], **{name: cache}, use_cache=True)
    return calls


def test_decoding_is_one_operator_a_mixer_and_one_for_the_head(model: Any) -> None:
    calls = one_token(patch(model), tokens())
    heads = hasattr(mixers(model)[0], "n_mamba_heads")  # which the operator does not have
    assert len(calls.of("mambablock::mamba_step")) == (0 if heads else len(mixers(model)))
    assert len(calls.of("mambablock::linear")) == 1


def test_decoding_calls_what_is_not_plain() -> None:
    model = patch(make_model("jamba"))
    first, second = mixers(model)
    first.x_proj.register_forward_hook(lambda *_: None)
    second.b_layernorm.register_forward_hook(lambda *_: None)
    model.lm_head.register_forward_hook(lambda *_: None)
    calls = one_token(model, tokens())
    assert not calls.of("mambablock::mamba_step")
    assert len(calls.of("mambablock::selective_state_update")) == 2
    assert len(calls.of("mambablock::linear")) == 1  # a head's hook is called around it


@torch.no_grad()
def test_a_cache_that_records_its_past_can_be_cropped() -> None:
    model, ids = patch(make_model("mamba")), tokens()
    name = cache_name(model)
    cache = model(ids[:, :5], use_cache=True)[name]
    if not hasattr(cache.layers[0], "activate_past_recording"):
        pytest.skip("this transformers has no such cache")
    for layer in cache.layers:
        layer.activate_past_recording()
    for t in range(5, 8):
        model(ids[:, t : t + 1], **{name: cache}, use_cache=True)
    kept, width = cache.layers[0].conv_states[0], mixers(model)[0].conv_kernel_size
    assert kept.shape[-1] == width + 3
    expected = model(ids[:, :8], use_cache=True)[name].layers[0].conv_states[0]
    assert_close(kept[..., -width:], expected)


@pytest.mark.parametrize("pieces", [[4, 7], [1, 2, 8], [9, 1, 1]])
def test_pieces_continue_the_cache(model: Any, pieces: list[int]) -> None:
    ids, name = tokens(), cache_name(model)
    expected = model(ids).logits
    patch(model)
    cache, logits = None, []
    with torch.no_grad():
        for piece in ids.split(pieces, dim=1):
            output = model(piece, **{name: cache}, use_cache=True)
            cache = output[name]
            logits.append(output.logits)
    assert_close(torch.cat(logits, dim=1), expected)


def test_gradients_pass_through_the_cache() -> None:
    model = patch(make_model("mamba"))
    ids, name = tokens(), cache_name(model)
    expected = torch.autograd.grad(model(ids).logits[:, 6:].sum(), list(model.parameters()))
    first = model(ids[:, :6], use_cache=True)
    # One token, whose states have gradients too.
    second = model(ids[:, 6:7], **{name: first[name]}, use_cache=True)
    third = model(ids[:, 7:], **{name: second[name]}, use_cache=True)
    loss = second.logits.sum() + third.logits.sum()
    assert_close(torch.autograd.grad(loss, list(model.parameters())), expected)


def test_gradient_checkpointing(model: Any) -> None:
    ids = tokens()
    patch(model).train()
    expected = gradients(model, input_ids=ids, labels=ids)
    model.gradient_checkpointing_enable()
    # The same operations again, on the same numbers.
    torch.testing.assert_close(
        gradients(model, input_ids=ids, labels=ids), expected, rtol=0, atol=0
    )


def test_weights_stay_and_save(model: Any, tmp_path: Path) -> None:
    before = {name: t.data_ptr() for name, t in model.state_dict().items()}
    expected = model(ids := tokens()).logits
    patch(model)
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == before
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(loaded(ids).logits, expected)
    assert_close(patch(loaded)(ids).logits, expected)


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba"])
def test_compile(kind: str) -> None:
    torch.compiler.reset()
    # One layer: more would be compiled in the same way.
    model, ids = make_model(kind, num_hidden_layers=1), tokens()
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    expected, expected_gradients = model(**inputs).logits, gradients(model, **inputs)
    model.zero_grad()
    output = torch.compile(patch(model), backend="aot_eager")(**inputs)
    output.loss.backward()
    assert_close(output.logits, expected)
    assert_close({name: p.grad for name, p in model.named_parameters()}, expected_gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_low_precision_is_as_exact(kind: str, dtype: torch.dtype) -> None:
    model, ids = make_model(kind), tokens()
    # The same weights as in low precision.
    exact = model.to(dtype).float()(ids).logits
    model.to(dtype)
    theirs = (model(ids).logits - exact).square().mean().sqrt()
    mine = (patch(model)(ids).logits - exact).square().mean().sqrt()
    # The norms and projections, the same in both, round most; Jamba's router may amplify luck.
    assert mine <= 2 * theirs + torch.finfo(dtype).eps * exact.abs().max()
    generated = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert generated.shape == (3, 16)


def test_autocast(model: Any) -> None:
    ids = tokens()
    exact = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = model(ids).logits.float()
        mine = patch(model)(ids).logits.float()
    error = (mine - exact).square().mean().sqrt()
    # As above.
    assert error <= 2 * (theirs - exact).square().mean().sqrt() + 2**-8 * exact.abs().max()


def test_other_activation() -> None:
    model = make_model("mamba", hidden_act="gelu")
    expected = model(ids := tokens()).logits
    assert_close(patch(model)(ids).logits, expected)


def test_every_mamba_1_mixer_is_known() -> None:
    """Of the installed transformers, by its sources: what projects to dt, B and C by x_proj."""
    found = set()
    models = Path(transformers.__file__).parent / "models"
    for path in models.glob("*/modeling_*.py"):
        source = path.read_text()
        if "A_log" not in source or "x_proj" not in source:
            continue
        for node in ast.parse(source).body:
            own = ast.get_source_segment(source, node) if isinstance(node, ast.ClassDef) else ""
            if re.search(r"self\.x_proj\w* =", own) and "self.A_log =" in own:
                found.add(node.name)
    assert found == {mixer.__name__ for mixer in _patched_classes}


# Patching


def test_patch_returns_the_model_and_unpatch_undoes_it(model: Any) -> None:
    classes = [type(mixer) for mixer in mixers(model)]
    assert patch(model) is model
    assert all(type(m).__name__.startswith("Patched") for m in mixers(model))
    assert all(isinstance(m, c) for m, c in zip(mixers(model), classes, strict=True))
    assert patch(model) is model
    assert unpatch(model) is model
    assert [type(mixer) for mixer in mixers(model)] == classes
    assert unpatch(model) is model
    assert [type(mixer) for mixer in mixers(model)] == classes


def test_patched_leaves_the_model_as_it_was() -> None:
    model = make_model("mamba")
    inner, outer = mixers(model)
    original = type(inner)
    patch(model.backbone.layers[1])
    with patched(model) as same:
        assert same is model
        assert type(inner) is type(outer) is not original
    assert type(inner) is original
    assert type(outer) is not original
    with pytest.raises(KeyError), patched(model):
        raise KeyError
    assert type(inner) is original


def test_a_model_without_mixers() -> None:
    with pytest.raises(ValueError, match=r"^patch: model must hold a Mamba-1 mixer .*got Linear"):
        patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^patched: .*got Linear"), patched(nn.Linear(2, 2)):
        pass
    assert isinstance(unpatch(nn.Linear(2, 2)), nn.Linear)


@pytest.mark.parametrize("function", [patch, unpatch, patched])
@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (None, "None"),
        ("state-spaces/mamba-130m-hf", "'state-spaces/mamba-130m-hf'"),
        (transformers.MambaConfig(), "MambaConfig"),
        (transformers.MambaForCausalLM, "type"),
        ([nn.Linear(2, 2)], "list of 1"),
    ],
    ids=["None", "name", "config", "class", "list"],
)
def test_what_is_no_module(function: Any, bad: Any, got: str) -> None:
    message = f"^{function.__name__}: model must be an nn.Module; got {got}"
    with pytest.raises(TypeError, match=message), contextlib.ExitStack() as stack:
        stack.enter_context(function(bad))


def test_an_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.cache_utils import Cache

    model = make_model("mamba")
    monkeypatch.delattr(Cache, "update_conv_state")
    message = rf"^patch: transformers must be .*{transformers.__version__}.*Cache.update_conv_state"
    with pytest.raises(ImportError, match=message):
        patch(model)
    assert type(mixers(model)[0]).__name__ == "MambaMixer"


def test_a_version_without_the_mixers(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "mambablock.integrations.transformers"
    monkeypatch.delattr("transformers.models.jamba.modeling_jamba.JambaMambaMixer")
    monkeypatch.delitem(sys.modules, name)
    message = rf"^{name}: transformers must be .*got {transformers.__version__}.*JambaMambaMixer"
    with pytest.raises(ImportError, match=message):
        importlib.import_module(name)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_patched_model(copy_of: Any) -> None:
    model = patch(make_model("mamba"))
    other = copy_of(model)
    ids = tokens()
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert unpatch(other) is other
    assert [type(m) for m in mixers(other)] != [type(m) for m in mixers(model)]


# Other libraries on a patched model


@pytest.mark.parametrize("layer", ["in_proj", "x_proj", "dt_proj"])
def test_lora(layer: str) -> None:
    peft = pytest.importorskip("peft")
    model = patch(make_model("mamba"))
    before = model(ids := tokens()).logits
    config = peft.LoraConfig(r=2, target_modules=[layer], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    assert (adapted(ids).logits - before).abs().max() > 1e-3
    adapted(input_ids=ids, labels=ids).loss.backward()
    found = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(found) == 4
    assert all(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("patch_first", [False, True])
def test_offloaded_weights(patch_first: bool) -> None:
    """accelerate's hooks wrap forward and bring the weights from elsewhere."""
    accelerate = pytest.importorskip("accelerate")
    model, ids = make_model("mamba"), tokens()
    expected = model(ids).logits
    if patch_first:
        patch(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    patch(model)
    assert mixers(model)[0].A_log.is_meta
    forward = mixers(model)[0]._old_forward
    assert forward.__func__ is type(mixers(model)[0]).forward
    with torch.no_grad():
        assert_close(model(ids).logits, expected)
        assert_close(unpatch(model)(ids).logits, expected)


def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer")
    path = Path(__file__).parents[1] / "examples" / "hugging_face.py"
    try:
        runpy.run_path(str(path))["main"](layers=1, width=16, batch=2, prompt=5, tokens=3)
    finally:
        transformers.logging.set_verbosity_warning()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["unpatched", "patched"]
    assert lines[-1] == "100% of the generated tokens are the same."
