# SPDX-License-Identifier: Apache-2.0
"""How Python comes to find this package's modules under the other packages' names."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["install"]

Context = importlib.metadata.DistributionFinder.Context

# Of each package: its extension, and what its Python part needs to be imported at all.
_extensions = {"mamba_ssm": "selective_scan_cuda", "causal_conv1d": "causal_conv1d_cuda"}
_needed = {"mamba_ssm": ("einops", "transformers", "triton"), "causal_conv1d": ()}
_vmamba = ("selective_scan_cuda_core", "selective_scan_cuda_oflex")

# What mamba_ssm has besides Mamba-1.
_not_provided = {
    f"mamba_ssm.{name}"
    for name in (
        *("distributed", "modules.mamba2", "modules.mamba2_simple", "modules.mamba3"),
        *("modules.mha", "modules.ssd_minimal", "ops.cute", "ops.tilelang"),
        *("ops.triton.k_activations", "ops.triton.layernorm_gated", "ops.triton.mamba3"),
        *("ops.triton.softplus", "ops.triton.ssd_bmm", "ops.triton.ssd_chunk_scan"),
        *("ops.triton.ssd_chunk_state", "ops.triton.ssd_combined", "ops.triton.ssd_state_passing"),
        "utils.determinism",
    )
}
_falcon_mamba = "transformers.models.falcon_mamba.modeling_falcon_mamba"


def install() -> None:
    """Let programs that import mamba_ssm or causal_conv1d find this package's modules.

    For code that cannot be changed; call it before that code is imported. `mamba_ssm`,
    `causal_conv1d` and their extensions `selective_scan_cuda` and `causal_conv1d_cuda` become names
    of the modules of :mod:`mambablock.compat`, as do VMamba's extensions
    `selective_scan_cuda_core` and `selective_scan_cuda_oflex`, and importlib.metadata knows their
    versions. Calling it again does nothing.

    A package that is installed with its extension, or already imported, stays, with a warning. One
    that is installed without its extension finds that here, and where it lacks more than that to be
    imported, such as Triton, the whole package is found here.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.names.update(name for name in _vmamba if not _is_installed(name))
    for package, extension in _extensions.items():
        if extension in _finder.names:
            continue
        if package in sys.modules or (_is_installed(package) and _is_installed(extension)):
            state = "imported" if package in sys.modules else "installed"
            advice = "call install() before it is" if state == "imported" else "uninstall it"
            warnings.warn(
                f"mambablock.compat.install: {package} is {state} and stays in use; {advice} "
                "to use mambablock in its place",
                stacklevel=2,
            )
        elif _is_installed(package) and all(map(_is_installed, _needed[package])):
            _finder.names.add(extension)
        else:
            _finder.names.update((package, extension))


def _is_installed(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


class _Finder(MetaPathFinder):
    """Finds modules of mambablock.compat under the other packages' names, and their metadata."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == _falcon_mamba and "mamba_ssm" in self.names:
            return _without_fused_path(PathFinder.find_spec(fullname, path))
        if fullname.partition(".")[0] not in self.names:
            return None
        if fullname in _not_provided:
            raise ModuleNotFoundError(
                f"No module named {fullname!r} in mambablock, which has mamba_ssm's Mamba-1 only",
                name=fullname,
            )
        own = importlib.util.find_spec(f"mambablock.compat.{fullname}")
        if own is None:
            return None
        is_package = own.submodule_search_locations is not None
        return ModuleSpec(fullname, _Alias(own.name), origin=own.origin, is_package=is_package)

    def find_distributions(
        self,
        context: Context = Context(),  # noqa: B008
    ) -> Iterator[importlib.metadata.Distribution]:
        for package in sorted(self.names & _extensions.keys()):
            wanted = None if context.name is None else re.sub(r"[-_.]+", "_", context.name).lower()
            if wanted in (None, package):
                yield _Distribution(package)


class _Alias(Loader):
    """Gives a module of mambablock.compat, which keeps its own name and spec."""

    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.name)
        self.own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own_spec


class _Distribution(importlib.metadata.Distribution):
    """A package's metadata, as far as availability checks look at it."""

    def __init__(self, package: str) -> None:
        self.package = package

    def read_text(self, filename: str) -> str | None:
        if filename == "top_level.txt":
            return f"{self.package}\n{_extensions[self.package]}\n"
        if filename != "METADATA":
            return None
        version = importlib.import_module(f"mambablock.compat.{self.package}").__version__
        name = self.package.replace("_", "-")
        return f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / str(path)


def _without_fused_path(spec: ModuleSpec | None) -> ModuleSpec | None:
    """FalconMamba's module with its mixer's path through mamba_inner_fn switched off.

    That norms delta after dt_proj, every other path of the mixer before it: a model would train
    as another one than it is evaluated as.
    """
    if spec is None or spec.loader is None:
        return spec
    execute = spec.loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        module.mamba_inner_fn = lambda *_, **__: None  # type: ignore[attr-defined]

    spec.loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


_finder = _Finder()
