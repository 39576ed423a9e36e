# SPDX-License-Identifier: Apache-2.0
"""Drives CMakeLists.txt, which is the build; everything declarative is in pyproject.toml."""

import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).parent.resolve()


def find_program(name: str) -> str | None:
    """The program of this interpreter's environment, active or not, or else the system's."""
    return shutil.which(name, path=os.pathsep.join([sys.prefix + "/bin", os.environ["PATH"]]))


def package_folder(name: str) -> Path | None:
    """Where a package is installed, without the seconds that importing torch takes."""
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def find_torch() -> Path:
    torch = package_folder("torch")
    if torch is None:
        raise SystemExit(
            f"mambablock: {sys.executable} has no torch to build against; install torch 2.10 or "
            "newer first, then build with --no-build-isolation"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        raise SystemExit(f"mambablock: expected torch 2.10 or newer; got torch {version}")
    return torch


class CMakeBuild(build_ext):
    """Builds all libraries into the folder that setuptools has chosen for the extension module."""

    def run(self) -> None:
        torch = find_torch()
        pybind11 = package_folder("pybind11")
        # torch ships pybind11's headers too.
        pybind11_include = (torch if pybind11 is None else pybind11) / "include"
        cmake = find_program("cmake")
        if cmake is None:
            raise SystemExit("mambablock: found no cmake; `pip install cmake` provides it")
        compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
        if shutil.which(compiler) is None:
            raise SystemExit(
                f"mambablock: found no C++ compiler `{compiler}`; install g++ 11 or newer, or set CXX"
            )

        ninja = find_program("ninja")
        generator = ["-G", "Unix Makefiles"]
        if ninja is not None:
            generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        build = (
            SOURCE / "build" / f"{sys.implementation.cache_tag}-{generator[1].split()[-1].lower()}"
        )
        output = Path(self.get_ext_fullpath(self.extensions[0].name)).parent
        # An install only adds: without this, a CUDA library outlives its build.
        for library in output.glob("libmambablock*.so"):
            library.unlink()
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        configure = [
            *[cmake, "-S", str(SOURCE), "-B", str(build), *generator],
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DTORCH_ROOT={torch}",
            f"-DPYBIND11_INCLUDE={pybind11_include}",
            f"-DMAMBABLOCK_CUDA={os.environ.get('MAMBABLOCK_CUDA', 'AUTO')}",
        ]
        for command in (
            configure,
            [cmake, "--build", str(build), "--parallel", jobs],
            [cmake, "--install", str(build), "--prefix", str(output)],
        ):
            if subprocess.run(command).returncode != 0:
                raise SystemExit(f"mambablock: failed: {shlex.join(command)}")


setup(ext_modules=[Extension("mambablock._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
