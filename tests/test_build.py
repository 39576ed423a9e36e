# SPDX-License-Identifier: Apache-2.0
"""The built libraries: what they say of themselves, depend on, and contain."""

import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mambablock

ROOT = Path(__file__).parent.parent
PACKAGE = Path(mambablock.__file__).parent
LIBRARIES = sorted(PACKAGE.glob("*.so"))
LEVELS = ["baseline", "avx2", "avx512"]
(VERSION,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)

# Those of the latest build in this source tree, if there was one.
LEVEL_OBJECTS = sorted(ROOT.glob("build/cpython-*/CMakeFiles/*_avx*.dir/**/*.o"))


def run(*command: str | Path, **environment: str) -> str:
    """Standard output of a command that succeeds, started outside of the source tree."""
    completed = subprocess.run(
        command, cwd="/", env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


def test_build_info() -> None:
    info = mambablock.build_info()
    assert info["version"] == VERSION
    assert re.fullmatch(r"\w+ [\d.]+", info["compiler"])
    assert info["cxx_standard"] >= 20
    assert info["torch_stable_abi"] == "2.10"
    assert info["simd_levels_built"] == LEVELS[: len(info["simd_levels_built"])]
    assert info["simd_level"] in info["simd_levels_built"]
    assert (info["cuda"] is not None) == (PACKAGE / "libmambablock_cuda.so").exists()


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_only_the_stable_abi_of_torch_is_used(library: Path) -> None:
    undefined = run("nm", "-D", "--undefined-only", library)
    assert "free" in undefined
    assert not re.findall(r"\b_Z\w*(?:2at|3c10|5torch)\w*", undefined)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_no_path_of_the_building_machine(library: Path) -> None:
    contents = library.read_bytes()
    for path in {str(ROOT), str(Path.home()), sys.prefix} - {"/", "/usr", "/usr/local"}:
        assert path.encode() not in contents
    assert not re.search(r"\((RPATH|RUNPATH)\)", run("readelf", "-d", library))


@pytest.mark.skipif(not LEVEL_OBJECTS, reason="no build folder beside the tests")
@pytest.mark.parametrize("path", LEVEL_OBJECTS, ids=lambda path: f"{path.parents[2].name}")
def test_faster_levels_share_no_function_with_others(path: Path) -> None:
    """The linker keeps one copy of each weak symbol; were it AVX-512's, other machines would crash.

    A symbol with the level's namespace in its name is the level's own, and DW.ref is only data.
    """
    symbols = run("nm", "--defined-only", path).splitlines()
    weak = [line.split()[-1] for line in symbols if re.search(r" [VWuvw] ", line)]
    level = "avx512" if "avx512" in str(path) else "avx2"
    own = re.compile(rf"10mambablock{len(level)}{level}|^DW\.ref\.")
    assert [name for name in weak if not own.search(name)] == []


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of the instructions of x86-64")
def test_kernels_ask_for_memory_ahead() -> None:
    """g++ drops a function that only prefetches, unless it is inlined, and says nothing."""
    code = run("objdump", "--disassemble", PACKAGE / "libmambablock.so")
    for instruction in ("prefetcht1", "prefetchw"):
        assert len(re.findall(rf"\t{instruction} ", code)) >= 50


PRINT_LEVEL = "import mambablock; print(mambablock.build_info()['simd_level'])"


@pytest.mark.parametrize("level", LEVELS)
def test_environment_lowers_the_simd_level(level: str) -> None:
    highest = run(sys.executable, "-c", PRINT_LEVEL, MAMBABLOCK_SIMD="").strip()
    if LEVELS.index(level) > LEVELS.index(highest):
        pytest.skip(f"this processor's highest level is {highest}")
    assert run(sys.executable, "-c", PRINT_LEVEL, MAMBABLOCK_SIMD=level).strip() == level


def test_unknown_simd_level_is_an_error() -> None:
    completed = subprocess.run(
        [sys.executable, "-c", PRINT_LEVEL],
        env={**os.environ, "MAMBABLOCK_SIMD": "sse9"},
        capture_output=True,
        text=True,
    )
    assert completed.returncode != 0
    expected = 'MAMBABLOCK_SIMD: expected baseline, avx2 or avx512; got "sse9"'
    assert completed.stderr.strip().endswith(f"RuntimeError: {expected}")


def pip(*arguments: str | Path, **environment: str) -> None:
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, **environment)


def build_wheel(source: Path, folder: Path) -> Path:
    # With the libraries of the build that is tested: CUDA's would take minutes.
    cuda = "OFF" if mambablock.build_info()["cuda"] is None else "ON"
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", folder)
    pip("wheel", *options, source, MAMBABLOCK_CUDA=cuda)
    (wheel,) = folder.glob("mambablock-*.whl")
    return wheel


USE_INSTALLED = """
import torch, mambablock
y = mambablock.MambaBlock(16)(torch.randn(2, 5, 16))
assert y.shape == (2, 5, 16)
print(mambablock.__file__)
"""


def test_wheel_works_outside_of_the_source_tree(tmp_path: Path) -> None:
    wheel = build_wheel(ROOT, tmp_path)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"mambablock/py.typed", f"mambablock-{VERSION}.dist-info/licenses/LICENSE"} <= names
    assert {f"mambablock/{library.name}" for library in LIBRARIES} <= names
    assert {name.split("/")[0] for name in names} == {
        "mambablock",
        f"mambablock-{VERSION}.dist-info",
    }
    site = tmp_path / "site"
    pip("install", "--no-deps", "--target", site, wheel)
    used = run(sys.executable, "-c", USE_INSTALLED, PYTHONPATH=str(site))
    assert Path(used.strip()) == site / "mambablock" / "__init__.py"


def source_distribution(folder: Path) -> Path:
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    (archive,) = folder.glob("mambablock-*.tar.gz")
    return archive


def test_source_distribution_holds_what_a_build_needs(tmp_path: Path) -> None:
    with tarfile.open(source_distribution(tmp_path)) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "CMakeLists.txt", "python/mambablock/py.typed"} <= files
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert sources <= files
    assert [name for name in files if name.startswith("tests") or name.endswith(".so")] == []


@pytest.mark.slow
def test_wheel_builds_from_the_source_distribution(tmp_path: Path) -> None:
    assert build_wheel(source_distribution(tmp_path), tmp_path).exists()
