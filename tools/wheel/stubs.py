# SPDX-License-Identifier: Apache-2.0
"""Stand-ins to link against, for libraries that run on every Linux of manylinux_2_28.

    python tools/wheel/stubs.py FOLDER COMPILER LIBTORCH

makes them in FOLDER, of the COMPILER's own libraries: of each symbol the newest version that glibc
2.28 and libstdc++ of g++ 8 have, and no other. What libstdc++ has only since then comes out of its
archive. LIBTORCH may be of another processor than the COMPILER's: torch's C interface has the same
names everywhere.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}

LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}

# Parts of libc since glibc 2.34: whoever uses their functions must name them for older ones.
FORMER_PARTS_OF_LIBC = ("libpthread.so.0", "libdl.so.2", "librt.so.1")

TORCH = re.compile(r" (FUNC) +GLOBAL +DEFAULT +\d+ ((?:aoti_)?torch_\w+)()$", re.MULTILINE)
SYSTEM = re.compile(
    r" (FUNC|IFUNC|OBJECT|NOTYPE|TLS) +(?:GLOBAL|WEAK|UNIQUE) +DEFAULT +\d+ "
    r"(\w+)@@?((?:GLIBC|GLIBCXX|CXXABI)_[\d.]+)$",
    re.MULTILINE,
)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def newest_allowed(library: Path, symbol: re.Pattern[str]) -> dict[str, tuple[str, str]]:
    """Kind and version of each symbol that the library defines."""
    command = ["readelf", "--dyn-syms", "--wide", str(library)]
    lines = subprocess.check_output(command, text=True)
    found: dict[str, tuple[str, str]] = {}
    for kind, name, version in symbol.findall(re.sub(r" +$", "", lines, flags=re.MULTILINE)):
        if version and numbers(version) > NEWEST[version.split("_")[0]]:
            continue
        if name not in found or numbers(version) > numbers(found[name][1]):
            found[name] = (kind, version)
    if not found:
        raise SystemExit(f"mambablock: found no symbol in {library}")
    return found


def assembly(symbols: dict[str, tuple[str, str]]) -> str:
    lines = []
    for i, (name, (kind, version)) in enumerate(sorted(symbols.items())):
        section, type_ = {
            "OBJECT": (".data", "object"),
            "TLS": ('.section .tdata,"awT",%progbits', "tls_object"),
        }.get(kind, (".text", "function"))
        label = f"symbol_{i}" if version else name
        lines += [section, f".globl {label}", f".type {label},%{type_}", f".size {label},8"]
        lines += [f"{label}: .quad 0"]
        lines += [f".symver {label}, {name}@@{version}, remove"] if version else []
    return "\n".join([*lines, '.section .note.GNU-stack,"",%progbits', ""])


@dataclass(frozen=True)
class Stubs:
    folder: Path
    compiler: str

    def ask(self, option: str) -> str:
        return subprocess.check_output([self.compiler, option], text=True).strip()

    def path(self, name: str) -> Path:
        """Of one of the compiler's libraries."""
        path = Path(self.ask(f"-print-file-name={name}"))
        if not path.is_absolute():
            raise SystemExit(f"mambablock: {self.compiler} has no {name}")
        return path

    def make(self, name: str, symbols: dict[str, tuple[str, str]]) -> None:
        source, versions = self.folder / f"{name}.s", self.folder / f"{name}.map"
        source.write_text(assembly(symbols))
        used = sorted({version for _, version in symbols.values() if version}, key=numbers)
        versions.write_text("".join(f"{version} {{}};\n" for version in used))
        script = [f"-Wl,--version-script={versions}"] if used else []
        command = [self.compiler, "-shared", "-nostdlib", f"-Wl,-soname,{name}", *script]
        subprocess.check_call([*command, "-o", str(self.folder / name), str(source)])

    def make_all(self, libtorch: Path) -> None:
        machine = self.ask("-dumpmachine").split("-")[0]
        if machine not in LOADERS:
            expected = " or ".join(LOADERS)
            raise SystemExit(
                f"mambablock: wheels are of {expected}; {self.compiler} is of {machine}"
            )
        loader = LOADERS[machine]
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("libc.so.6", "libm.so.6", "libstdc++.so.6", loader):
            self.make(name, newest_allowed(self.path(name), SYSTEM))
        for name in FORMER_PARTS_OF_LIBC:
            self.make(name, {})
        self.make("libtorch_cpu.so", newest_allowed(libtorch, TORCH))

        here, libc_archive = self.folder, self.path("libc_nonshared.a")
        for name, script in {
            "libc.so": f"GROUP ( {here}/libc.so.6 {libc_archive} AS_NEEDED ( {here}/{loader} ) )",
            "libm.so": f"INPUT ( {here}/libm.so.6 )",
            "libstdc++.so": f"INPUT ( {here}/libstdc++.so.6 {self.path('libstdc++.a')} )",
        }.items():
            (here / name).write_text(script + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    Stubs(Path(sys.argv[1]).resolve(), sys.argv[2]).make_all(Path(sys.argv[3]))
