# SPDX-License-Identifier: Apache-2.0
"""compat.install() and `python -m mambablock.compat`, in fresh interpreters."""

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
import importlib.metadata
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
assert mamba_ssm is ours and ours.__spec__.name == "mambablock.compat.mamba_ssm"
for name in ("mamba_ssm", "mamba-ssm", "causal_conv1d", "Causal.Conv1d"):
    version = importlib.metadata.version(name)
    module = ours if "m" in name[:1] else our_conv
    assert version == module.__version__, (name, version)
assert importlib.metadata.packages_distributions()["selective_scan_cuda"] == ["mamba-ssm"]
try:
    importlib.metadata.version("torch-scan")
except importlib.metadata.PackageNotFoundError:
    print("found")
"""
    assert run(program) == "found\n"


def test_what_is_not_provided() -> None:
    program = """
import mambablock.compat
mambablock.compat.install()
for statement in (
    "import mamba_ssm.modules.mamba2",
    "from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined",
    "from mamba_ssm.ops.triton.layernorm_gated import RMSNorm",
    "from mamba_ssm import Mamba2",
    "import mamba_ssm.nothing",
):
    try:
        exec(statement)
    except ImportError as error:
        print(error)
print(hasattr(mambablock.compat.mamba_ssm, "mamba_split_conv1d_scan_combined"))
"""
    assert run(program).splitlines() == [
        "No module named 'mamba_ssm.modules.mamba2' in mambablock, which has mamba_ssm's "
        "Mamba-1 only",
        "No module named 'mamba_ssm.ops.triton.ssd_combined' in mambablock, which has mamba_ssm's "
        "Mamba-1 only",
        "No module named 'mamba_ssm.ops.triton.layernorm_gated' in mambablock, which has "
        "mamba_ssm's Mamba-1 only",
        "cannot import name 'Mamba2' from mambablock, which has Mamba-1 only",
        "No module named 'mamba_ssm.nothing'",
        "False",
    ]


WARNINGS = """
import warnings
{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mambablock.compat
    mambablock.compat.install()
import mamba_ssm, causal_conv1d, selective_scan_cuda
assert causal_conv1d.causal_conv1d_fn
print("own" if hasattr(mamba_ssm, "original") else "mambablock", end=" ")
print("own" if hasattr(selective_scan_cuda, "original") else "mambablock")
print(*(w.message for w in caught if "mambablock" in str(w.message)))
"""


def stub(folder: Path, *names: str) -> None:
    for name in names:
        (folder / f"{name}.py").write_text("original = True\n")


def test_installed_packages_stay(tmp_path: Path) -> None:
    stub(tmp_path, "mamba_ssm", "selective_scan_cuda")
    found, warning = run(WARNINGS.format(before=""), tmp_path).splitlines()
    assert found == "own own"
    assert warning.startswith(
        "mambablock.compat.install: mamba_ssm is installed and stays in use; uninstall it to"
    )


def test_imported_packages_stay(tmp_path: Path) -> None:
    stub(tmp_path, "mamba_ssm", "selective_scan_cuda")
    found, warning = run(WARNINGS.format(before="import mamba_ssm"), tmp_path).splitlines()
    assert found == "own own"
    assert "mamba_ssm is imported and stays in use; call install() before" in warning


def test_packages_without_their_extension(tmp_path: Path) -> None:
    """Their Python stays where it can be imported, and finds the extension here."""
    stub(tmp_path, "mamba_ssm", "einops", "transformers", "triton")
    assert run(WARNINGS.format(before=""), tmp_path).splitlines() == ["own mambablock", ""]
    for name in ("einops", "transformers", "triton"):
        (tmp_path / f"{name}.py").unlink()
    # Then it could not be imported.
    missing = "import sys; sys.modules['triton'] = None; del sys.modules['triton']"
    without_triton = run(WARNINGS.format(before=missing), tmp_path).splitlines()
    assert without_triton in (["mambablock mambablock", ""], ["own mambablock", ""])
    try:
        import triton  # noqa: F401
    except ImportError:
        assert without_triton == ["mambablock mambablock", ""]


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
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model.generate(ids, **options), tokens)
print("same")
"""
    assert run(program) == "same\n"


# python -m mambablock.compat


def run_module(*arguments: str, folder: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


PROGRAM = """
import sys, beside
from mamba_ssm import Mamba
print(sys.argv[1:], __name__, beside.value, Mamba.__module__, sys.path[0])
def fail():
    raise KeyError("here")
if sys.argv[1] == "exit":
    sys.exit(3)
if sys.argv[1] == "fail":
    fail()
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("value = 7\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mamba_ssm.py").write_text("class Mamba: pass\n")
    (tmp_path / "selective_scan_cuda.py").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("script", ["ok", "--flag"]),
        ("script", ["fail"]),
        ("module", ["exit"]),
        ("module", ["fail"]),
    ],
)
def test_runs_a_program_as_python_does(program: Path, kind: str, arguments: list[str]) -> None:
    called = [str(program / "program.py")] if kind == "script" else ["-m", "program"]
    plain = run_module(*called, *arguments, folder=program)
    for name in ("mamba_ssm.py", "selective_scan_cuda.py"):
        (program / name).unlink()
    code, out, error = run_module("-m", "mambablock.compat", *called, *arguments, folder=program)
    module = "mambablock.compat.mamba_ssm.modules.mamba_simple"
    assert (code, out.replace(module, "mamba_ssm")) == plain[:2]
    # Python's own traceback of a module begins in runpy.
    own = [line for line in plain[2].splitlines() if "frozen runpy" not in line]
    assert error.splitlines() == own
    assert ("KeyError: 'here'" in own) == (arguments[0] == "fail")


def test_runs_a_command_and_tells_its_usage(tmp_path: Path) -> None:
    command = "import sys, mamba_ssm; print(sys.argv, __name__, mamba_ssm.__version__)"
    code, out, _ = run_module("-m", "mambablock.compat", "-c", command, "a", folder=tmp_path)
    assert (code, out.split(" ", 2)[:2]) == (0, ["['-c',", "'a']"])
    for arguments, expected in (((), 2), (("--help",), 0)):
        code, out, error = run_module("-m", "mambablock.compat", *arguments, folder=tmp_path)
        assert code == expected
        assert "usage: python -m mambablock.compat" in out + error
    code, _, error = run_module("-m", "mambablock.compat", "missing.py", folder=tmp_path)
    assert code == 2
    assert "can't open file" in error
    code, _, error = run_module("-m", "mambablock.compat", "-m", "missing_", folder=tmp_path)
    assert code == 1
    assert error.endswith("No module named missing_\n")
