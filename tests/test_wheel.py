# SPDX-License-Identifier: Apache-2.0
"""What makes and checks wheels, and what is said where the package cannot run."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tools.wheel import check, stubs

import mambablock

ROOT = Path(__file__).parents[1]
PACKAGE = Path(mambablock.__file__).parent
COMPILER = shutil.which("g++")
LIBTORCH = Path(torch.__file__).parent / "lib/libtorch_cpu.so"

MANYLINUX_2_28 = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11)}

# Uses what glibc 2.28 and libstdc++ of g++ 8 do not have, or have under older versions.
NEW_SYMBOLS = """
#include <cmath>
#include <memory>
#include <sstream>
#include <thread>
double run(double x, const char* text) {
  std::istringstream stream(text);  // GLIBCXX_3.4.26
  auto shared = std::make_shared<double>(x);  // GLIBC_2.32's __libc_single_threaded
  std::thread([shared] { *shared = std::exp(*shared); }).join();  // GLIBC_2.34, GLIBC_2.29
  return *shared + (stream.get() == 'a');
}
"""


def python(code: str, *arguments: str | Path, **environment: str) -> str:
    """The last line of what a failing interpreter writes."""
    completed = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 1, completed.stderr
    return completed.stderr.splitlines()[-1]


def versions(library: Path) -> dict[str, tuple[int, ...]]:
    """The newest version of each family that a library needs."""
    needed = subprocess.check_output(["readelf", "--version-info", "--wide", library], text=True)
    newest: dict[str, tuple[int, ...]] = {}
    for family, version in re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI)_([\d.]+)", needed):
        newest[family] = max(newest.get(family, ()), stubs.numbers(version))
    return newest


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
def test_stubs_hold_only_old_symbol_versions(tmp_path: Path) -> None:
    source, single = tmp_path / "run.cpp", tmp_path / "single_threaded.cpp"
    source.write_text(NEW_SYMBOLS)
    single.write_text('extern "C" { [[gnu::visibility("hidden")]] char __libc_single_threaded; }')
    stubs.Stubs(tmp_path / "stubs", COMPILER or "").make_all(LIBTORCH)
    command = [COMPILER, "-std=c++20", "-shared", "-fPIC", "-Wl,-z,defs", "-pthread", source]
    plain, portable = tmp_path / "plain.so", tmp_path / "portable.so"
    subprocess.check_call([*command, "-o", plain])
    hidden = [f"-L{tmp_path}/stubs", "-Wl,--exclude-libs,ALL"]
    subprocess.check_call([*command, single, *hidden, "-o", portable])
    assert any(found > MANYLINUX_2_28[name] for name, found in versions(plain).items())
    assert all(found <= MANYLINUX_2_28[name] for name, found in versions(portable).items())


def test_stubs_refuse_another_processor(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho riscv64-linux-gnu\n")
    compiler.chmod(0o755)
    with pytest.raises(SystemExit, match=r"wheels are of x86_64 or aarch64; .* is of riscv64"):
        stubs.Stubs(tmp_path, str(compiler)).make_all(LIBTORCH)


@pytest.mark.parametrize(
    ("package", "expected"),
    [
        ("mambablock-0.1.0-py3-none-any.whl", "found no"),
        (f"mambablock-0.1.0-py3-none-manylinux_2_28_{platform.machine()}.whl", "must have at most"),
    ],
)
def test_check_refuses_a_wheel(
    package: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / package).write_bytes(b"123")
    (tmp_path / "pyproject.toml").write_text('version = "0.1.0"\n')
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setitem(check.MOST_BYTES, platform.machine(), 2)
    with pytest.raises(SystemExit, match=expected):
        check.audit(platform.machine())


def test_check_writes_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "platforms.md"
    table.write_text((ROOT / "docs/platforms.md").read_text())
    monkeypatch.setattr(check, "TABLE", table)
    row = dict.fromkeys(check.COLUMNS, "one")
    for name in ("Debian 11", "venv", "Debian 11"):
        check.write(name, row)
    lines = [line for line in table.read_text().splitlines() if "one" in line.split(" | ")]
    assert [line.split(" | ")[0] for line in lines] == ["| venv", "| Debian 11"]
    assert table.read_text().endswith((ROOT / "docs/platforms.md").read_text()[-80:])


def test_smoke_test_refuses_a_compiler(tmp_path: Path) -> None:
    for name in ("cc", "c++"):
        (tmp_path / name).touch(0o755)
    code = f"import runpy; runpy.run_path({str(ROOT / 'tools/wheel/smoke.py')!r}, None, '__main__')"
    last = python(code, PATH=str(tmp_path), PYTHONPATH=str(PACKAGE.parent))
    assert last == "AssertionError: expected no compiler in PATH; got ['cc', 'c++']"


# Where it cannot run

IMPORT = "import sys; sys.path.insert(0, sys.argv[1]); import torch; {}; import mambablock"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "mambablock"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("*_cuda.so", "_C.*", "*.pyc"))
    return folder


def test_old_torch(copy: Path) -> None:
    last = python(IMPORT.format("torch.__version__ = '2.9.1+cpu'"), copy.parent)
    assert last == "ImportError: mambablock: expected torch 2.10 or newer; got torch 2.9.1+cpu"


def test_library_of_another_machine(copy: Path) -> None:
    library = copy / "libmambablock.so"
    contents = bytearray(library.read_bytes())
    contents[18:20] = (243).to_bytes(2, "little")  # RISC-V, in ELF's e_machine
    library.write_bytes(contents)
    last = python(IMPORT.format("pass"), copy.parent)
    assert last.startswith(f"ImportError: mambablock: {library} must be for this machine (linux, ")
    assert platform.machine() in last
    assert last.endswith("cannot open shared object file: No such file or directory")


def test_missing_library(copy: Path) -> None:
    (copy / "libmambablock.so").unlink()
    last = python(IMPORT.format("pass"), copy.parent)
    assert last.startswith("ImportError: mambablock: libmambablock.so is not beside the package")


def test_second_copy_in_a_process(copy: Path) -> None:
    code = f"torch.ops.load_library({str(PACKAGE / 'libmambablock.so')!r})"
    last = python(IMPORT.format(code), copy.parent)
    expected = f"a process must have one copy of it; got {PACKAGE} and {copy}"
    assert last == f"ImportError: mambablock: {expected}"


def test_importing_again_is_harmless() -> None:
    code = (
        "import mambablock, sys; [sys.modules.pop(m) for m in [*sys.modules] if m[:5] == 'mamba']"
    )
    again = "import mambablock; mambablock.MambaBlock(8)(__import__('torch').randn(1, 2, 8))"
    subprocess.run([sys.executable, "-c", f"{code}; {again}"], check=True, capture_output=True)


def test_nothing_is_written_into_the_package(copy: Path) -> None:
    """So that it may be read-only; Python does without .pyc files that it cannot write."""
    before = sorted(copy.rglob("*"))
    code = "import sys; sys.path.insert(0, sys.argv[1]); import mambablock as m; m.build_info()"
    subprocess.run([sys.executable, "-B", "-c", code, copy.parent], check=True, capture_output=True)
    assert sorted(copy.rglob("*")) == before
