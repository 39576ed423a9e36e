# SPDX-License-Identifier: Apache-2.0
"""The machine code (SASS) of the kernels in a library, and what they use, by NVIDIA's tools."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path


class MissingToolError(Exception):
    """A tool is missing; the text says which, and where to get it."""


@dataclass(frozen=True)
class Control:
    """What the compiler wrote into an instruction for the schedulers, which look no further."""

    stall: int = 1  # clocks until the warp's next instruction
    sets: int | None = None  # the scoreboard that is busy until its result is there
    frees: int | None = None  # the scoreboard that is busy until its operands have been read
    waits: int = 0  # a bit for each of the six scoreboards that must be free before it is issued

    @classmethod
    def decode(cls, high_word: int) -> Control:
        """From the upper 64 bits of an instruction of sm_70 or newer."""
        bits = high_word >> 41  # 105 to 125 of the instruction

        def scoreboard(shift: int) -> int | None:
            number = bits >> shift & 7
            return None if number == 7 else number

        return cls(bits & 15, scoreboard(5), scoreboard(8), bits >> 11 & 63)


@dataclass
class Instruction:
    address: int
    guard: str  # a predicate, "PT" for none
    opcode: str
    operands: list[str]
    control: Control = Control()


@dataclass
class Kernel:
    name: str  # as C++ has it, with its parameters and without namespaces
    architecture: int
    registers: int
    stack: int
    static_shared: int
    code: list[Instruction] = field(default_factory=list)

    @property
    def template(self) -> str:
        return template_of(self.name)

    @property
    def spills(self) -> int:
        """Loads and stores of local memory, which holds spilled registers."""
        return sum(i.opcode.split(".")[0] in ("LDL", "STL") for i in self.code)


def find_tools() -> Path:
    """The folder with cuobjdump and nvdisasm, which it calls."""
    folders = [
        *(folder for package in _namespace_folders("nvidia") for folder in package.glob("cu*/bin")),
        *(Path(program).parent for program in [shutil.which("cuobjdump")] if program),
    ]
    for folder in folders:
        if (folder / "cuobjdump").exists() and (folder / "nvdisasm").exists():
            return folder
    raise MissingToolError(
        "found no cuobjdump and nvdisasm; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    )


def _namespace_folders(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [] if spec is None else [Path(p) for p in spec.submodule_search_locations or []]


def read_kernels(library: Path) -> list[Kernel]:
    """All kernels in a library, for all the architectures that it holds machine code for."""
    usage = _cuobjdump("--dump-resource-usage", str(library))
    sass = _cuobjdump("--dump-sass", str(library))
    kernels: dict[tuple[int, str], Kernel] = {}
    for architecture, name, line in _resource_lines(usage):
        numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        kernels[architecture, name] = Kernel(
            name, architecture, numbers["REG"], numbers["STACK"], numbers["SHARED"]
        )
    for architecture, name, code in parse_sass(sass):
        if (architecture, name) in kernels:
            kernels[architecture, name].code = code
    demangled = demangle([name for _, name in kernels])
    for kernel, name in zip(kernels.values(), demangled, strict=True):
        kernel.name = short_name(name)
    return [kernel for kernel in kernels.values() if kernel.code]


def demangle(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        raise MissingToolError("found no c++filt; it is in binutils, which come with g++")
    result = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()


def short_name(demangled: str) -> str:
    """kernel<types>(parameters), without the namespaces, of which nvcc names one after the file."""
    text = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|mambablock::", "", demangled)
    return text.removeprefix("void ")


def template_of(name: str) -> str:
    """kernel<types>, without the parameters."""
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


def find_kernel(kernels: list[Kernel], name: str) -> Kernel:
    """The kernel of that name; compilers spell some types of parameters differently."""
    same = [kernel for kernel in kernels if kernel.name == name]
    same = same or [kernel for kernel in kernels if kernel.template == template_of(name)]
    if len(same) != 1:
        raise MissingToolError(
            f"found {len(same)} kernels {name}; the libraries must be of one tree"
        )
    return same[0]


def _cuobjdump(*arguments: str) -> str:
    folder = find_tools()
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        [str(folder / "cuobjdump"), *arguments], capture_output=True, text=True, env=environment
    )
    if result.returncode != 0:
        raise MissingToolError(f"cuobjdump failed: {result.stderr.strip()}")
    return result.stdout


def _resource_lines(usage: str) -> list[tuple[int, str, str]]:
    found = []
    architecture, name = 0, ""
    for line in usage.splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            found.append((architecture, name, line))
    return found


_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w))?\s*([A-Z][\w.]*)\s*(.*?)\s*;")
# The second line of an instruction has its upper word alone.
_HIGH_WORD = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/\s*$")


def parse_sass(sass: str) -> list[tuple[int, str, list[Instruction]]]:
    """The architecture, name and code of each function in what cuobjdump --dump-sass prints."""
    found: list[tuple[int, str, list[Instruction]]] = []
    architecture = 0
    for line in sass.splitlines():
        if match := re.match(r"\s*code for sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.match(r"\s*Function : (\S+)", line):
            found.append((architecture, match[1], []))
        elif match := _INSTRUCTION.match(line):
            address, guard, opcode, operands = match.groups()
            found[-1][2].append(
                Instruction(
                    int(address, 16),
                    guard or "PT",
                    opcode,
                    [part.strip() for part in operands.split(",")] if operands else [],
                )
            )
        elif match := _HIGH_WORD.match(line):
            found[-1][2][-1].control = Control.decode(int(match[1], 16))
    return found
