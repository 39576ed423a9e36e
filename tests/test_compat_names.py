# SPDX-License-Identifier: Apache-2.0
"""compat has the packages' own names and signatures, and docs/migration.md lists them."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

from mambablock import compat
from mambablock.compat import _install
from other_packages import signatures, sources

FOLDER = Path(compat.__file__).parent
MODULES = sorted(
    module.name.removeprefix("mambablock.compat.")
    for module in pkgutil.walk_packages([str(FOLDER)], "mambablock.compat.")
    if not re.search(r"\._", module.name)
)
MIGRATION = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()

# Of the originals' functions and classes: what has to do with their kernels and with autograd, with
# attention, or with CUDA graphs.
NOT_PROVIDED = {
    "mamba_ssm.ops.selective_scan_interface": {
        *("rms_norm_forward", "_check_selective_scan_cuda"),
    },
    "mamba_ssm.ops.triton.layer_norm": {"config_prune", "LayerNormFn", "LayerNormLinearFn"},
    "mamba_ssm.utils.generation": {"DecodingCGCache", "update_graph_cache", "capture_graph"},
    "mamba_ssm.utils.torch": {"custom_amp_decorator"},
    "causal_conv1d.cpp_functions": {
        *("_causal_conv1d_fwd_cpp", "_causal_conv1d_bwd_cpp", "_causal_conv1d_update_cpp"),
    },
    "causal_conv1d.causal_conv1d_varlen": {"_causal_conv1d_varlen_states"},
}
# Of an autograd.Function: the function that its apply is.
APPLIED = {
    "SelectiveScanFn.forward": "selective_scan_fn",
    "MambaInnerFn.forward": "mamba_inner_fn",
    "CausalConv1dFn.forward": "causal_conv1d_fn",
}
# What goes beyond theirs: Vision Mamba's arguments, and what keeps a parameter's name.
LONGER = {"Mamba.__init__": 5}


def original(module: str) -> Path:
    package = module.partition(".")[0]
    path = sources(package.replace("_", "-")) / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize(
    "module",
    [
        "mamba_ssm.ops.selective_scan_interface",
        "mamba_ssm.ops.triton.layer_norm",
        "mamba_ssm.ops.triton.selective_state_update",
        "mamba_ssm.modules.block",
        "mamba_ssm.modules.mamba_simple",
        "mamba_ssm.modules.mlp",
        "mamba_ssm.models.config_mamba",
        "mamba_ssm.models.mixer_seq_simple",
        "mamba_ssm.utils.generation",
        "mamba_ssm.utils.hf",
        "mamba_ssm.utils.torch",
        "causal_conv1d.causal_conv1d_interface",
        "causal_conv1d.causal_conv1d_varlen",
        "causal_conv1d.cpp_functions",
    ],
)
def test_signatures_are_theirs(module: str) -> None:
    left_out = NOT_PROVIDED.get(module, set())
    mine = signatures(FOLDER / f"{module.replace('.', '/')}.py")
    own = importlib.import_module(f"mambablock.compat.{module}")
    checked = 0
    for name, theirs in signatures(original(module)).items():
        first = name.partition(".")[0]
        if name.removesuffix(".backward") != name:
            continue  # autograd's own
        if first in left_out or re.match(r"_layer_norm_|_selective_scan_update", first):
            assert not hasattr(own, first), name
            continue
        assert hasattr(own, first), name
        if name in APPLIED:
            assert _plain(mine[APPLIED[name]]) == _plain(theirs[1:]), name  # without ctx
            continue
        if name not in mine:
            # Inherited, or the same function under another name.
            assert hasattr(getattr(own, first), name.rpartition(".")[2]) or "." not in name, name
            continue
        extra = LONGER.get(name, 0)
        got = mine[name][: len(mine[name]) - extra] if extra else mine[name]
        assert _plain(got) == _plain(theirs), name
        checked += 1
    assert checked > 0 or module.endswith(("config_mamba", "utils.torch"))


def _plain(arguments: tuple[str, ...]) -> list[str]:
    return [re.sub(r"=0\.0001$", "=1e-4", a).replace("(1,)", "1,") for a in arguments]


def test_versions_are_theirs() -> None:
    for module in ("mamba_ssm", "causal_conv1d"):
        text = original(module).read_text()
        version = re.search(r'__version__ = "([0-9.]+)', text)[1].rstrip(".")
        assert getattr(compat, module).__version__ == version


def test_what_is_not_provided_exists() -> None:
    for name in _install._not_provided:
        assert importlib.util.find_spec(f"mambablock.compat.{name}") is None
        assert original(name).exists(), name


# docs/migration.md


def rows(heading: str) -> dict[str, set[str]]:
    """The table below a heading: names in code by the module in code before them."""
    section = MIGRATION.split(f"{heading}\n", 1)[1].split("\n#", 1)[0]
    found = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            module, names = line.strip("| ").split(" | ", 1)
            found[module.strip("`")] = set(re.findall(r"`([\w.]+)`", names))
    return found


def test_the_table_is_what_is_provided() -> None:
    table = rows("### What is provided")
    expected = {}
    for name in MODULES:
        module = importlib.import_module(f"mambablock.compat.{name}")
        if getattr(module, "__all__", None):
            expected[name] = set(module.__all__)
    assert table == expected


def test_the_other_table_is_what_is_not() -> None:
    table = rows("### What is not provided")
    assert set(table) == {name for name in _install._not_provided if name.startswith("mamba_ssm.")}
