# SPDX-License-Identifier: Apache-2.0
"""compat.install() in fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(program: str, *folders: Path) -> str:
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    # What transformers says where it finds no such package.
    assert "falling back" not in done.stderr
    return done.stdout if done.returncode == 0 else done.stderr


def test_imports_find_the_functions() -> None:
    program = """
import importlib.util
import mambablock.compat
mambablock.compat.install()
mambablock.compat.install()
import mamba_ssm.ops.selective_scan_interface
import causal_conv1d
from causal_conv1d.causal_conv1d_interface import causal_conv1d_update
from mamba_ssm import Mamba, mamba_inner_fn, selective_scan_fn
from mamba_ssm.modules.mamba_simple import Mamba as Same
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as scan
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mambablock.compat import mamba_ssm as ours, causal_conv1d as our_conv
assert Same is Mamba is ours.Mamba
assert mamba_ssm.ops.selective_scan_interface.selective_scan_fn is scan is ours.selective_scan_fn
assert selective_state_update is ours.selective_state_update
assert causal_conv1d.causal_conv1d_fn is our_conv.causal_conv1d_fn
assert causal_conv1d_update is our_conv.causal_conv1d_update
assert importlib.util.find_spec("mamba_ssm") is not None
try:
    import mamba_ssm.modules.mamba2
except ModuleNotFoundError as error:
    print(error)
"""
    assert run(program) == "No module named 'mamba_ssm.modules.mamba2'\n"


def test_installed_packages_stay(tmp_path: Path) -> None:
    (tmp_path / "mamba_ssm.py").write_text("original = True\n")
    program = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mambablock.compat
    mambablock.compat.install()
import mamba_ssm, causal_conv1d
assert mamba_ssm.original and causal_conv1d.causal_conv1d_fn
print(*(w.message for w in caught if "mambablock" in str(w.message)))
"""
    assert run(program, tmp_path).startswith(
        "mambablock.compat.install: mamba_ssm is installed and stays in use;"
    )


def test_transformers_uses_them() -> None:
    pytest.importorskip("transformers")
    program = """
import mambablock.compat
mambablock.compat.install()
import torch, transformers
from mambablock.integrations.transformers import patched
sizes = dict(vocab_size=31, hidden_size=16, num_hidden_layers=2, state_size=4, use_bias=True)
for kind in ("mamba", "falcon_mamba"):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.randint(1, 31, (2, 9))
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    for train in (False, True):
        model.train(train)
        with patched(model):
            expected = model(ids).logits
            tokens = model.generate(ids, **options)
        # FalconMamba's path for training norms dt elsewhere than its other path.
        if kind == "mamba" or not train:
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model.generate(ids, **options), tokens)
print("same")
"""
    assert run(program) == "same\n"
