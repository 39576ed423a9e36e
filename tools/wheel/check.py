# SPDX-License-Identifier: Apache-2.0
"""Installs wheels where nothing else of the project is, and writes down what ran there.

    python -m tools.wheel.check [NAME ...]

checks the wheels in dist/ in the named environments, by default in CI's. Each is made anew under
build/wheel-check/ and has no compiler in its PATH. Rows of docs/platforms.md are replaced by what
was found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build/wheel-check"
TABLE = ROOT / "docs/platforms.md"
TAG = "manylinux_2_28"
MOST_BYTES = {"x86_64": 20_000_000, "aarch64": 1_000_000}

# What torch's CPU wheel for aarch64 needs; pip would choose by the machine that it runs on.
OF_TORCH = ("filelock", "fsspec", "jinja2", "networkx", "numpy", "sympy", "typing-extensions")

SMOKE = "import, operators against the definition, training, step, torch.compile, README's example"

# Those of the operators, which need neither a compiler nor the source tree.
TESTS = ["causal_conv1d", "operator_contract", "operator_errors", "selective_scan", "updates"]
TESTS_NEED = ("hypothesis", "pytest")

Row = dict[str, str]


def run(*command: str | Path, **environment: str) -> str:
    """What a command that succeeds prints, started outside of the source tree."""
    completed = subprocess.run(
        command,
        cwd=FOLDER,
        env={**os.environ, "PYTHONPATH": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if completed.returncode != 0:
        raise SystemExit(f"{completed.stdout}\nmambablock: failed: {' '.join(map(str, command))}")
    return completed.stdout


def wheel(machine: str) -> Path:
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    path = ROOT / f"dist/mambablock-{version}-py3-none-{TAG}_{machine}.whl"
    if not path.exists():
        raise SystemExit(f"mambablock: found no {path}; `make wheel PLATFORM={machine}` makes it")
    return path


def audit(machine: str) -> None:
    """Raises SystemExit unless the wheel is small and its libraries are what its tag promises."""
    path = wheel(machine)
    size, most = path.stat().st_size, MOST_BYTES[machine]
    if size > most:
        raise SystemExit(f"mambablock: {path.name} must have at most {most} bytes; got {size}")
    report = " ".join(run(sys.executable, "-m", "auditwheel", "show", path).split())
    glibc = re.findall(rf'constrains the platform tag to "manylinux_2_(\d+)_{machine}"', report)
    if [int(minor) > 28 for minor in glibc] != [False]:
        raise SystemExit(f"{report}\nmambablock: {path.name} must be of {TAG}_{machine}")
    if machine == platform.machine():
        run(
            *(sys.executable, "-m", "auditwheel", "repair", f"--plat={TAG}_{machine}"),
            *("--only-plat", "--exclude=libtorch*.so", "--wheel-dir=repaired", path),
        )
    print(f"{path.name}: {size / 1e6:.2f} MB, manylinux_2_{glibc[0]} would do", flush=True)


def smoke(folder: Path, *python: str | Path, inside: str = "", **environment: str) -> Row:
    """A row, of what the smoke test found; `inside` is where the interpreter sees the folder."""
    shutil.copy(ROOT / "tools/wheel/smoke.py", folder)
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    (folder / "example.py").write_text(example)
    seen = inside or str(folder)
    output = run(*python, f"{seen}/smoke.py", f"{seen}/example.py", **environment)
    found: Row = json.loads(output.splitlines()[-1])
    if Path(found.pop("package")).is_relative_to(ROOT / "python"):
        raise SystemExit("mambablock: expected the wheel's package; got the source tree's")
    return found | {"ran": SMOKE}


def install(folder: Path, python: str, machine: str, *packages: str) -> None:
    """Packages for another Python than this one, by this one's pip."""
    platforms = [f"manylinux_{glibc}_{machine}" for glibc in ("2_17", "2_27", "2_28")]
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"),
        *("--target", folder, "--python-version", python, "--only-binary=:all:"),
        *(f"--platform={name}" for name in [*platforms, f"manylinux2014_{machine}"]),
        *packages,
    )


def venv(torch: str, folder: Path) -> Row:
    run(sys.executable, "-m", "venv", folder)
    pip = (folder / "bin/python", "-m", "pip", "install", "--quiet", "--no-compile")
    run(*pip, torch, "numpy")
    began = time.monotonic()
    run(folder / "bin/pip", "install", "--quiet", wheel(platform.machine()))
    seconds = time.monotonic() - began
    found = smoke(folder, folder / "bin/python", PATH=str(folder / "bin"))
    return found | {"install": f"{seconds:.1f} s"}


def debootstrap(suite: str, folder: Path, *options: str) -> None:
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        raise SystemExit("mambablock: this check needs root and Debian's debootstrap")
    run("debootstrap", "--variant=minbase", *options, suite, folder)


def debian(suite: str, python: str, torch: str, folder: Path) -> Row:
    debootstrap(suite, folder, "--include=python3,python3-venv")
    machine = platform.machine()
    install(folder / "site", python, machine, torch, "numpy")
    shutil.copy(wheel(machine), folder)
    run("chroot", folder, "python3", "-m", "venv", "/env")
    offline = ("install", "--quiet", "--no-index", "--no-deps")
    run("chroot", folder, "/env/bin/pip", *offline, f"/{wheel(machine).name}")
    path = {"PATH": "/env/bin:/usr/sbin:/usr/bin", "PYTHONPATH": "/site"}
    return smoke(folder, "chroot", folder, "python3", inside="/", **path)


def old_glibc(suite: str, torch: str, folder: Path) -> Row:
    """Whether an older system's loader finds all that the libraries name."""
    debootstrap(suite, folder)
    python = ".".join(platform.python_version_tuple()[:2])
    install(folder / "site", python, platform.machine(), torch)
    shutil.unpack_archive(wheel(platform.machine()), folder / "wheel", "zip")
    path = "/site/torch/lib:/site/torch.libs"
    for library in (folder / "wheel/mambablock").glob("*.so"):
        inside = f"/wheel/mambablock/{library.name}"
        command = ("chroot", folder, "/usr/bin/env", f"LD_LIBRARY_PATH={path}", "ldd", "-r", inside)
        missing = re.findall(r".*(?:not found|undefined symbol).*", run(*command))
        # A torch without CUDA lacks both.
        without_cuda = re.compile(r"libtorch_cuda\.so|aoti_torch_get_current_cuda_stream")
        if missing := [line for line in missing if not without_cuda.search(line)]:
            raise SystemExit(
                "\n".join([*missing, f"mambablock: {inside} does not load in {suite}"])
            )
    glibc = re.findall(r"[\d.]+$", run("chroot", folder, "ldd", "--version").splitlines()[0])[0]
    (version,) = (path.name.split("-")[1] for path in folder.glob("site/torch-*.dist-info"))
    version = version.removesuffix(".dist")
    row = {"machine": platform.machine(), "glibc": glibc, "python": "", "torch": version}
    return row | {"simd_level": "", "ran": "`ldd -r` of the libraries"}


def aarch64(suite: str, python: str, torch: str, folder: Path) -> Row:
    """Under qemu's user mode: the files of an arm64 Debian, of which none is configured."""
    qemu = shutil.which("qemu-aarch64-static")
    if qemu is None:
        raise SystemExit("mambablock: this check needs Debian's qemu-user-static")
    debootstrap(suite, folder, "--arch=arm64", "--foreign", "--include=python3")
    for package in (folder / "var/cache/apt/archives").glob("*.deb"):
        run("dpkg-deb", "--extract", package, folder)
    site = folder / "site"
    install(site, python, "aarch64", "--no-deps", torch)
    install(site, python, "aarch64", *OF_TORCH, *TESTS_NEED)
    install(site, python, "aarch64", "--no-deps", str(wheel("aarch64")))
    shutil.copytree(ROOT / "tests", folder / "tests")
    python3 = (qemu, "-L", folder, folder / f"usr/bin/python{python}")
    environment = {"PATH": "", "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    found = smoke(folder, *python3, **environment)
    files = [folder / f"tests/test_{name}.py" for name in TESTS]
    options = ("-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider")
    tests = run(*python3, "-m", "pytest", *options, *files, **environment).splitlines()[-1]
    (passed,) = re.findall(r"\d+ passed", tests)
    return found | {"ran": f"{SMOKE}; the operators' tests: {passed}"}


ENVIRONMENTS: dict[str, Callable[[Path], Row]] = {
    "venv": partial(venv, "torch==2.13.0"),
    "oldest torch": partial(venv, "torch==2.10.0"),
    "newest torch": partial(venv, "torch"),
    "Debian 13": partial(debian, "trixie", "3.13", "torch"),
    "Debian sid": partial(debian, "sid", "3.14", "torch"),
    "Debian 11": partial(old_glibc, "bullseye", "torch==2.13.0"),
    "arm64 under qemu": partial(aarch64, "bookworm", "3.11", "torch==2.10.0"),
}
IN_CI = ["venv"]

COLUMNS = {
    "machine": "processor",
    "glibc": "glibc",
    "python": "Python",
    "torch": "torch",
    "simd_level": "SIMD level",
    "ran": "what ran",
}


def write(name: str, row: Row) -> None:
    """Into the table, in the environments' order."""
    text = TABLE.read_text()
    rows = dict(re.findall(r"^\| ([\w .]+) (\| .*)$", text, re.M))
    rows[name] = f"| {' | '.join(row[column] for column in COLUMNS)} |"
    lines = [f"| {name} {rows[name]}" for name in ENVIRONMENTS if name in rows]
    head = [
        f"| environment | {' | '.join(COLUMNS.values())} |",
        "| --- " * (len(COLUMNS) + 1) + "|",
    ]
    before = text[: text.index("| environment |")]
    after = re.split(r"\n(?!\|)", text[len(before) :], maxsplit=1)[1]
    TABLE.write_text(before + "\n".join([*head, *lines]) + "\n" + after)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.wheel.check")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ENVIRONMENTS))
    parser.add_argument("--all", action="store_true", help="all of them")
    arguments = parser.parse_args()
    names = list(ENVIRONMENTS) if arguments.all else arguments.names or IN_CI
    if unknown := [name for name in names if name not in ENVIRONMENTS]:
        parser.error(f"NAME must be one of {', '.join(ENVIRONMENTS)}; got {unknown[0]}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for machine in MOST_BYTES:
        if machine == platform.machine() or any(ROOT.glob(f"dist/*_{machine}.whl")):
            audit(machine)
    for name in names:
        folder = FOLDER / name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        row = ENVIRONMENTS[name](folder)
        print(f"{name}: {', '.join(f'{key} {value}' for key, value in row.items())}", flush=True)
        write(name, row)


if __name__ == "__main__":
    main()
