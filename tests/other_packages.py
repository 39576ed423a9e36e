# SPDX-License-Identifier: Apache-2.0
"""Sources of other packages from the package index, for tests that hold names to theirs."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[1] / "build" / "other_packages"
PINS = {
    "mamba-ssm": "2.3.2.post1",
    "causal-conv1d": "1.7.0",
    "mambapy": "1.2.0",
    "opensr-mamba": "0.0.1",
}
# Those that have a source distribution to be read, not a wheel.
SOURCES = ("mamba-ssm", "causal-conv1d")

# In place of Triton, for programs that import it and run no kernel: whatever is asked of it is
# there, and decorates.
TRITON_STAND_IN = """
from transformers.generation import GenerateDecoderOnlyOutput, TextStreamer  # before, without it
import sys
from collections import defaultdict
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
class Anything:
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()
    def __call__(self, *args, **kwargs):
        if len(args) != 1 or not callable(args[0]):
            return Anything()
        args[0].configs = [SimpleNamespace(kwargs=defaultdict(lambda: 64))]
        return args[0]
    __le__ = __lt__ = __ge__ = __gt__ = lambda self, other: True
class Module(type(sys)):
    __version__ = "3.0.0"
    __path__ = []
    __getattr__ = Anything.__getattr__
for name in ("triton", "triton.language", "triton.language.extra", "triton.testing"):
    sys.modules[name] = Module(name)
    sys.modules[name].__spec__ = ModuleSpec(name, None)
"""


@functools.cache
def sources(name: str) -> Path:
    """The folder of a package's Python files, nothing of which is installed or compiled."""
    pinned = f"{name.replace('-', '_')}-{PINS[name]}"
    folder = CACHE / pinned
    if not folder.is_dir():
        # One process of a parallel run may find another's files: each unpacks into its own.
        own = CACHE / f"{os.getpid()}-{pinned}"
        command = ["download", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary=:all:" if name in SOURCES else "--only-binary=:all:"]
        command += [f"--dest={own}", f"{name}=={PINS[name]}"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *command],
            env=os.environ
            | {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE"},
            capture_output=True,
            text=True,
        )
        found = list(own.glob("*.tar.gz")) + list(own.glob("*.whl"))
        if done.returncode != 0 or not found:
            pytest.skip(f"needs {name}=={PINS[name]} from a package index, with pip and wheel")
        if name in SOURCES:
            with tarfile.open(found[0]) as tar:
                tar.extractall(own, filter="data")
        else:
            with zipfile.ZipFile(found[0]) as wheel:
                wheel.extractall(own / pinned)
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


def run_program(program: str, *arguments: str, packages: tuple[str, ...] = ()) -> str:
    """What a program prints, in a fresh interpreter that finds these packages' files too."""
    paths = [*(str(sources(name)) for name in packages), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
