# SPDX-License-Identifier: Apache-2.0
"""Sources of other packages from the package index, for tests that hold names to theirs."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[1] / "build" / "other_packages"
PINS = {"mamba-ssm": "2.3.2.post1", "causal-conv1d": "1.7.0"}


@functools.cache
def sources(name: str) -> Path:
    """The folder of a source distribution, nothing of which is installed or compiled."""
    pinned = f"{name}-{PINS[name]}".replace(name, name.replace("-", "_"))
    folder = CACHE / pinned
    if not folder.is_dir():
        # One process of a parallel run may find another's files: each unpacks into its own.
        own = CACHE / f"{os.getpid()}-{pinned}"
        command = ["download", "--quiet", "--no-deps", "--no-binary=:all:", "--no-build-isolation"]
        command += [f"--dest={own}", f"{name}=={PINS[name]}"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *command],
            env=os.environ
            | {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE"},
            capture_output=True,
            text=True,
        )
        archive = own / f"{pinned}.tar.gz"
        if done.returncode != 0 or not archive.exists():
            pytest.skip(f"needs {name}=={PINS[name]} from a package index, with pip and wheel")
        with tarfile.open(archive) as tar:
            tar.extractall(own, filter="data")
        if not folder.is_dir():
            (own / pinned).rename(folder)
    return folder


def signatures(path: Path) -> dict[str, tuple[str, ...]]:
    """Arguments with their defaults, of the functions of a module and of its classes' methods."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = _arguments(node)
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    found[f"{node.name}.{method.name}"] = _arguments(method)
    return found


def _arguments(node: ast.FunctionDef) -> tuple[str, ...]:
    arguments = [*node.args.posonlyargs, *node.args.args]
    defaults = [None] * (len(arguments) - len(node.args.defaults)) + node.args.defaults
    return tuple(
        a.arg if d is None else f"{a.arg}={ast.unparse(d)}"
        for a, d in zip(arguments, defaults, strict=True)
    )
