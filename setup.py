# SPDX-License-Identifier: Apache-2.0
"""Drives CMakeLists.txt, which is the build; everything declarative is in pyproject.toml."""

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# Where set, the wheel is for every Linux, torch and Python of it; see tools/wheel/stubs.py.
WHEEL_PLATFORM = os.environ.get("MAMBABLOCK_WHEEL_PLATFORM")
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


def run(*command: str) -> None:
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"mambablock: failed: {shlex.join(command)}")


class CMakeBuild(build_ext):
    """Builds all libraries into the folder that setuptools has chosen for the extension module."""

    def run(self) -> None:
        if sys.platform != "linux":
            raise SystemExit(f"mambablock: expected Linux; got {sys.platform}")
        if WHEEL_PLATFORM not in (None, "x86_64", "aarch64"):
            raise SystemExit(f"mambablock: expected x86_64 or aarch64; got {WHEEL_PLATFORM}")
        torch = find_torch()
        pybind11 = package_folder("pybind11")
        cmake = find_program("cmake")
        if cmake is None:
            raise SystemExit("mambablock: found no cmake; `pip install cmake` provides it")
        cross = WHEEL_PLATFORM not in (None, platform.machine())
        chosen = os.environ.get("CXX", f"{WHEEL_PLATFORM}-linux-gnu-g++" if cross else "")
        compilers = shlex.split(chosen)[:1] or ["c++", "g++", "clang++"]
        if not any(shutil.which(compiler) for compiler in compilers):
            raise SystemExit(
                f"mambablock: found no C++ compiler ({', '.join(compilers)}); install g++ 11 or "
                "newer, or set CXX"
            )

        ninja = find_program("ninja")
        generator = "Unix Makefiles" if ninja is None else "Ninja"
        # CMake keeps a folder's first compiler.
        kind = [sys.implementation.cache_tag, generator.split()[-1].lower(), Path(chosen).name]
        build = f"{SOURCE}/build/{'-'.join(part for part in kind if part)}"
        output = Path(self.get_ext_fullpath(self.extensions[0].name)).parent
        run(
            *(cmake, "-S", str(SOURCE), "-B", build, "-G", generator),
            *([] if ninja is None else [f"-DCMAKE_MAKE_PROGRAM={ninja}"]),
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DTORCH_ROOT={torch}",
            # torch ships pybind11's headers too.
            f"-DPYBIND11_INCLUDE={pybind11 or torch}/include",
            f"-DMAMBABLOCK_CUDA={os.environ.get('MAMBABLOCK_CUDA', 'AUTO')}",
            f"-DMAMBABLOCK_PORTABLE={'OFF' if WHEEL_PLATFORM is None else 'ON'}",
            *([f"-DCMAKE_CXX_COMPILER={chosen}", "-DCMAKE_SYSTEM_NAME=Linux"] if cross else []),
            *([f"-DCMAKE_SYSTEM_PROCESSOR={WHEEL_PLATFORM}"] if cross else []),
        )
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        run(cmake, "--build", build, "--parallel", jobs)
        # An install only adds: without this, a CUDA library outlives its build.
        for library in output.glob("libmambablock*.so"):
            library.unlink()
        run(cmake, "--install", build, "--prefix", str(output))


class PortableWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", f"manylinux_2_28_{WHEEL_PLATFORM}"


setup(
    ext_modules=[Extension("mambablock._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild}
    | ({} if WHEEL_PLATFORM is None else {"bdist_wheel": PortableWheel}),
)
