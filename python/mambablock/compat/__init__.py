# SPDX-License-Identifier: Apache-2.0
"""mamba-ssm's and causal-conv1d's functions, under their names, on mambablock's operators."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import causal_conv1d, mamba_ssm

__all__ = ["causal_conv1d", "install", "mamba_ssm"]

_conv = {
    "causal_conv1d_fn": causal_conv1d.causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d.causal_conv1d_update,
}
_scan = {
    "selective_scan_fn": mamba_ssm.selective_scan_fn,
    "mamba_inner_fn": mamba_ssm.mamba_inner_fn,
}
_update = {"selective_state_update": mamba_ssm.selective_state_update}
_module = {"Mamba": mamba_ssm.Mamba}

# What each of the two packages has where, parents first; those with children are packages.
_packages: dict[str, dict[str, dict[str, Any]]] = {
    "mamba_ssm": {
        "mamba_ssm": {**_scan, **_module},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": _scan,
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.selective_state_update": _update,
        "mamba_ssm.modules": {},
        "mamba_ssm.modules.mamba_simple": _module,
    },
    "causal_conv1d": {
        "causal_conv1d": _conv,
        "causal_conv1d.causal_conv1d_interface": _conv,
    },
}


def install() -> None:
    """Let `import mamba_ssm` and `import causal_conv1d` find this package's functions.

    For code that cannot be changed; call it before that code is imported. Modules appear where the
    originals have these functions, such as ``mamba_ssm.ops.selective_scan_interface``. A package
    that is itself installed stays, with a warning. Calling it again does nothing.
    """
    for package, modules in _packages.items():
        present = sys.modules.get(package)
        if present is None and importlib.util.find_spec(package) is None:
            _install(modules)
        elif present is None or not getattr(present, "__mambablock__", False):
            warnings.warn(
                f"mambablock.compat.install: {package} is installed and stays in use; uninstall "
                "it to use mambablock in its place",
                stacklevel=2,
            )


def _install(modules: dict[str, dict[str, Any]]) -> None:
    for name, contents in modules.items():
        is_package = any(other.startswith(f"{name}.") for other in modules)
        module = ModuleType(name, "Provided by mambablock.compat.install().")
        module.__dict__.update(contents, __mambablock__=True)
        module.__spec__ = ModuleSpec(name, loader=None, is_package=is_package)
        if is_package:
            module.__path__ = []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
