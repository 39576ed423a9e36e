# SPDX-License-Identifier: Apache-2.0
"""Programs of the package index, as they are, by install() or patch(), beside their slow paths.

Each prints its times in milliseconds: of mambablock, of the slow path.
"""

from __future__ import annotations

import pytest

from other_packages import TRITON_STAND_IN, run_program

PRELUDE = """
import time, types, sys, warnings
warnings.simplefilter("ignore")
import mambablock.compat
mambablock.compat.install()
import torch
torch.manual_seed(0)
torch.set_num_threads(1)
# Float32 sums of some hundred terms in another order; gradients of sums of thousands.
same = lambda a, b, tolerance=1e-4: torch.testing.assert_close(
    a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))
def timed(function):
    function()
    start = time.perf_counter()
    result = function()
    return result, round(1000 * (time.perf_counter() - start))
def trained(model, *inputs):
    model.zero_grad()
    y = model(*inputs)
    y = y.logits if hasattr(y, "logits") else y
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]
def compare(mine, slow):
    (a, fast), (b, plain) = timed(mine), timed(slow)
    assert len(a) == len(b) > 1
    for x, y in zip(a, b):
        same(x, y, 1e-3)
    print(fast, plain)
"""

# Its Python, with its autograd functions, on our extensions.
MAMBA_SSM = (
    TRITON_STAND_IN
    + PRELUDE
    + """
import mamba_ssm, selective_scan_cuda, causal_conv1d_cuda
from mamba_ssm.ops import selective_scan_interface as interface
from mamba_ssm.modules import mamba_simple
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.generation import InferenceParams
assert "mambablock" not in mamba_ssm.__file__ and "mambablock" in selective_scan_cuda.__file__
mamba_simple.selective_state_update = None  # a Triton kernel; then it steps in plain PyTorch
config = MambaConfig(d_model=64, n_layer=2, vocab_size=64, rms_norm=False, fused_add_norm=False)
model = MambaLMHeadModel(config)
ids = torch.randint(0, 64, (2, 64))
def plain(*args, delta_bias, delta_softplus):
    return interface.mamba_inner_ref(*args, delta_bias=delta_bias, delta_softplus=delta_softplus)
def by(function):
    mamba_simple.mamba_inner_fn = function
    return trained(model, ids)
def slow():
    interface.selective_scan_fn = interface.selective_scan_ref
    return by(plain)
compare(lambda: by(interface.mamba_inner_fn), slow)
params = InferenceParams(max_seqlen=256, max_batch_size=2)
with torch.no_grad():
    logits = model(ids[:, :8]).logits
    outputs = [model(ids[:, :6], inference_params=params).logits]
    for t in (6, 7):
        params.seqlen_offset = t
        outputs.append(model(ids[:, t : t + 1], inference_params=params).logits)
same(torch.cat(outputs, dim=1), logits)
"""
)

MAMBAPY = (
    PRELUDE
    + """
from mambapy.mamba import Mamba, MambaConfig
slow = Mamba(MambaConfig(d_model=64, n_layers=2))
fast = Mamba(MambaConfig(d_model=64, n_layers=2, use_cuda=True))
fast.load_state_dict(slow.state_dict())
assert fast.layers[0].mixer.selective_scan_cuda.__module__.startswith("mambablock")
x = torch.randn(2, 128, 64)
compare(lambda: trained(fast, x), lambda: trained(slow, x))
with torch.no_grad():
    caches = [(None, torch.zeros(2, 128, 3)) for _ in range(2)]
    steps = []
    for t in range(6):
        y, caches = fast.step(x[:, t], caches)
        steps.append(y)
    same(torch.stack(steps, dim=1), fast(x[:, :6]))
"""
)

# With its trained weights; of timm it needs two small functions and a layer that is off in
# evaluation.
OPENSR = (
    PRELUDE
    + """
timm = types.ModuleType("timm")
timm.layers = types.ModuleType("timm.layers")
timm.layers.DropPath = lambda probability: torch.nn.Identity()
timm.models = types.ModuleType("timm.models")
timm.models.layers = types.ModuleType("timm.models.layers")
timm.models.layers.trunc_normal_ = torch.nn.init.trunc_normal_
timm.models.layers.to_2tuple = lambda x: x if isinstance(x, tuple) else (x, x)
sys.modules.update({"timm": timm, "timm.layers": timm.layers, "timm.models": timm.models,
                    "timm.models.layers": timm.models.layers})
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
from opensr_mamba.main import load_models
torch.nn.Module.cuda = lambda self: self  # load_models insists on a GPU
model = load_models(img_size=16)[0]
image = torch.rand(1, 3, 16, 16)
first = model.conv_first.weight.requires_grad_()
def by(scan):
    for module in model.modules():
        if hasattr(module, "selective_scan"):
            module.selective_scan = scan
    y = model(image, save_attention_maps=True)[0]
    return [y.detach(), *torch.autograd.grad(y.square().mean(), [first])]
compare(lambda: by(selective_scan_fn), lambda: by(selective_scan_ref))
assert by(selective_scan_fn)[0].shape == (1, 3, 64, 64)
"""
)

TRANSFORMERS = (
    PRELUDE
    + """
import transformers
from transformers.models.mamba import modeling_mamba as modeling
sizes = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, pad_token_id=0)
config = transformers.MambaConfig(**sizes)
model = transformers.MambaForCausalLM(config)
ids = torch.randint(1, 64, (1, 48))
names = ("mamba_inner_fn", "mamba_selective_scan", "mamba_selective_state_update",
         "causal_conv1d_fn", "causal_conv1d_update")
fast = {name: getattr(modeling, name) for name in names}
def by(wrapped):
    for name, function in fast.items():
        setattr(modeling, name, function.__wrapped__ if wrapped else function)
    return trained(model.train(), ids)
compare(lambda: by(False), lambda: by(True))
model.eval()
def generated(wrapped):
    by(wrapped)
    return model.eval().generate(ids[:, :8], max_new_tokens=8, do_sample=False)
assert torch.equal(generated(False), generated(True))
"""
)


@pytest.mark.parametrize(
    ("program", "packages"),
    [
        pytest.param(MAMBA_SSM, ("mamba-ssm",), id="mamba-ssm"),
        pytest.param(MAMBAPY, ("mambapy",), id="mambapy"),
        pytest.param(OPENSR, ("opensr-mamba",), id="opensr-mamba"),
        pytest.param(TRANSFORMERS, (), id="transformers"),
    ],
)
def test_program(program: str, packages: tuple[str, ...]) -> None:
    pytest.importorskip("transformers")
    if packages and packages[0] != "mambapy":
        pytest.importorskip("einops", reason="these programs need einops")
    fast, slow = map(int, run_program(program, packages=packages).split()[-2:])
    # The slow path loops over time in Python; where it is not much slower, ours is not in use.
    assert fast < slow
