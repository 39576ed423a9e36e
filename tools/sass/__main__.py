# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m tools.sass --help`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from typer import Option

from . import EMULATION, LIBRARY
from .account import Account, Device, accounts
from .launches import Problem, record
from .listing import Kernel, MissingToolError, read_kernels
from .thread import PARAMETERS, UnknownBranchError


def main(
    library: Annotated[Path, Option(help="The library with the kernels.")] = LIBRARY,
    emulation: Annotated[Path, Option(help="The library of the emulated kernels.")] = EMULATION,
    only: Annotated[str, Option(help="Only kernels with this in their names.")] = "",
    opcodes: Annotated[int, Option(help="How many of the most issued opcodes to list.")] = 0,
    listing: Annotated[
        bool, Option(help="Print how often a thread issues each instruction.")
    ] = False,
) -> None:
    """Report what each CUDA kernel uses, and what the scan issues per state-step."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    for path in (library, emulation):
        if not path.exists():
            print(f"mambablock: found no {path}; make cuda-check builds it", file=sys.stderr)
            raise typer.Exit(1)
    try:
        kernels = read_kernels(library)
        console.print(usage_table([kernel for kernel in kernels if only in kernel.name]))
        problem, device = Problem(), Device()
        launches = record(emulation, problem, device.multiprocessors)
        table = account_table(problem, device)
        for operator, launched in launches.items():
            chosen = [launch for launch in launched if only in launch.kernel]
            for architecture in sorted({kernel.architecture for kernel in kernels}):
                if chosen and architecture in PARAMETERS:
                    found = accounts(kernels, chosen, architecture, problem)
                    add_accounts(table, operator, found, problem, device)
                    for account in found:
                        if opcodes:
                            console.print(opcode_line(account, opcodes))
                        if listing:
                            print_listing(account, operator)
        console.print(table)
    except (MissingToolError, UnknownBranchError) as error:
        print(f"mambablock: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def usage_table(kernels: list[Kernel]) -> Table:
    table = Table(title="What the kernels use")
    table.add_column("kernel")
    for name in ("sm", "registers", "static shared", "stack", "spills", "instructions"):
        table.add_column(name, justify="right")
    for kernel in sorted(kernels, key=lambda kernel: (kernel.name, kernel.architecture)):
        numbers = (
            kernel.architecture,
            kernel.registers,
            kernel.static_shared,
            kernel.stack,
            kernel.spills,
            len(kernel.code),
        )
        table.add_row(kernel.template, *map(str, numbers))
    return table


def account_table(problem: Problem, device: Device) -> Table:
    table = Table(
        title=f"What the scan issues at batch {problem.batch}, length {problem.length}, "
        f"{problem.channels} channels, {problem.states} states in bfloat16",
        caption=f"Per state-step. The least time is that of the issue slots or of the exp unit, "
        f"whichever is longer, on {device.name}.",
    )
    for name in ("operator", "kernel"):
        table.add_column(name)
    for name in ("sm", "blocks", "threads", "shared", "issued", "MUFU", "least ms"):
        table.add_column(name, justify="right")
    return table


def add_accounts(
    table: Table, operator: str, found: list[Account], problem: Problem, device: Device
) -> None:
    for account in found:
        launch, kernel = account.launch, account.kernel
        table.add_row(
            *(operator, kernel.template, str(kernel.architecture)),
            *map(str, (launch.blocks, launch.threads, launch.dynamic_shared)),
            *(f"{account.issued:.2f}", f"{account.exps:.2f}"),
            f"{account.milliseconds(problem, device):.3f}",
        )
    total = [sum(numbers) for numbers in zip(*((a.issued, a.exps) for a in found), strict=True)]
    least = sum(account.milliseconds(problem, device) for account in found)
    table.add_row(operator, "all", "", "", "", "", *(f"{n:.2f}" for n in total), f"{least:.3f}")
    table.add_section()


def opcode_line(account: Account, count: int) -> str:
    share = account.issued / account.opcodes.total()
    names = (f"{name} {n * share:.2f}" for name, n in account.opcodes.most_common(count))
    return f"{account.kernel.template}, sm_{account.kernel.architecture}: {', '.join(names)}"


def print_listing(account: Account, operator: str) -> None:
    print(f"{operator}: {account.kernel.template}, sm_{account.kernel.architecture}")
    for instruction, visits in zip(account.kernel.code, account.visits, strict=True):
        guard = "" if instruction.guard == "PT" else f"@{instruction.guard} "
        text = f"{guard}{instruction.opcode} {', '.join(instruction.operands)}"
        print(f"{visits:9} 0x{instruction.address:05x} {text}")


if __name__ == "__main__":
    typer.run(main)
