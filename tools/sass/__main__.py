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
from .account import Account, accounts
from .launches import Launch, Problem, record
from .listing import Kernel, MissingToolError, read_kernels
from .machine import CAPACITIES, DEVICES, LATENCIES, Device, blocks_per_multiprocessor
from .simulated import CASES, WARPS, Simulated, simulate_operator
from .thread import PARAMETERS, UnknownBranchError


def main(
    library: Annotated[Path, Option(help="The library with the kernels.")] = LIBRARY,
    emulation: Annotated[Path, Option(help="The library of the emulated kernels.")] = EMULATION,
    only: Annotated[str, Option(help="Only kernels with this in their names.")] = "",
    operator: Annotated[str, Option(help="Only operators with this in their names.")] = "",
    device: Annotated[str, Option(help=f"One of {', '.join(DEVICES)}.")] = "h200",
    architecture: Annotated[int, Option(help="Of the machine code that is simulated.")] = 90,
    latency: Annotated[
        list[str] | None, Option(help=f"NAME=CLOCKS of {', '.join(LATENCIES)}; repeatable.")
    ] = None,
    count: Annotated[bool, Option(help="Count what the scan issues, too.")] = False,
    opcodes: Annotated[int, Option(help="How many of the most issued opcodes to list.")] = 0,
    listing: Annotated[
        bool, Option(help="Print how often a thread issues each instruction.")
    ] = False,
) -> None:
    """Report what each CUDA kernel uses, and simulate how long it takes."""
    console = Console(width=None if sys.stdout.isatty() else 170)
    for path in (library, emulation):
        if not path.exists():
            print(f"mambablock: found no {path}; make cuda-check builds it", file=sys.stderr)
            raise typer.Exit(1)
    simulated_device = chosen_device(device, latency or [])
    try:
        kernels = read_kernels(library)
        console.print(usage_table([kernel for kernel in kernels if only in kernel.name]))
        recorded = record(
            emulation,
            [problem for case in CASES for problem in case.problems],
            simulated_device.multiprocessors,
        )
        full = recorded[2]  # the first case's own
        console.print(occupancy_table(kernels, full))
        built = [kernel for kernel in kernels if kernel.architecture == architecture]
        if architecture in PARAMETERS and built:
            table = simulated_table(simulated_device)
            for i, case in enumerate(CASES):
                for name in full:
                    if operator in name and "memory" not in name:
                        of_problems = [launches[name] for launches in recorded[3 * i : 3 * i + 3]]
                        found = simulate_operator(built, of_problems, case, simulated_device)
                        add_simulated(table, case.name, name, found)
            console.print(table)
        if count or opcodes or listing:
            print_accounts(console, kernels, full, only, opcodes, listing)
    except (MissingToolError, UnknownBranchError) as error:
        print(f"mambablock: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def chosen_device(name: str, latencies: list[str]) -> Device:
    if name not in DEVICES:
        raise typer.BadParameter(f"expected one of {', '.join(DEVICES)}; got {name}")
    device = DEVICES[name]
    for setting in latencies:
        key, _, clocks = setting.partition("=")
        if key not in LATENCIES or not clocks.isdecimal():
            names = ", ".join(LATENCIES)
            raise typer.BadParameter(f"expected NAME=CLOCKS of {names}; got {setting}")
        device.latencies[key] = int(clocks)
    return device


def print_accounts(
    console: Console,
    kernels: list[Kernel],
    launches: dict[str, list[Launch]],
    only: str,
    opcodes: int,
    listing: bool,
) -> None:
    problem, device = Problem(), Device()
    table = account_table(problem, device)
    for operator, launched in launches.items():
        chosen = [launch for launch in launched if only in launch.kernel]
        if "convolution" in operator or not chosen:
            continue
        for architecture in sorted({kernel.architecture for kernel in kernels}):
            if architecture in PARAMETERS:
                found = accounts(kernels, chosen, architecture, problem)
                add_accounts(table, operator, found, problem, device)
                for account in found:
                    if opcodes:
                        console.print(opcode_line(account, opcodes))
                    if listing:
                        print_listing(account, operator)
    console.print(table)


def occupancy_table(kernels: list[Kernel], launches: dict[str, list[Launch]]) -> Table:
    table = Table(
        title="Blocks that a multiprocessor has room for",
        caption="By registers, shared memory and warps, of the blocks of a bfloat16 launch.",
    )
    table.add_column("kernel")
    for name in ("threads", "shared", *(f"sm_{a}" for a in CAPACITIES)):
        table.add_column(name, justify="right")
    seen = {launch.kernel: launch for launched in launches.values() for launch in launched}
    for name, launch in sorted(seen.items()):
        same = {k.architecture: k for k in kernels if k.name == name}
        fit = [
            str(blocks_per_multiprocessor(same[a], launch.threads, launch.dynamic_shared))
            if a in same
            else ""
            for a in CAPACITIES
        ]
        table.add_row(name.split("(")[0], str(launch.threads), str(launch.dynamic_shared), *fit)
    return table


def simulated_table(device: Device) -> Table:
    assumed = ", ".join(f"{name} {clocks}" for name, clocks in device.latencies.items())
    table = Table(
        title=f"Simulated, not measured, in bfloat16 on {device.name}",
        caption="Clocks of a scheduler for 512 state-steps, over whole tiles: with so many warps a "
        "scheduler, and as launched. The time is that of the whole launch. Assumed: "
        f"{device.multiprocessors} multiprocessors at {device.clock / 1e9:.2f} GHz; "
        f"{device.attained:.0%} of {device.bandwidth / 1e12:.2f} TB/s; latencies {assumed}.",
    )
    for name in ("problem", "operator", "kernel"):
        table.add_column(name)
    warps = (f"{n} warp{'s' if n > 1 else ''}" for n in WARPS)
    for name in ("blocks", "resident", *warps, "launched", "GB", "ms"):
        table.add_column(name, justify="right")
    return table


def add_simulated(table: Table, case: str, operator: str, found: list[Simulated]) -> None:
    for one in found:
        table.add_row(
            *(case, operator, one.kernel.template),
            *(str(one.launch.blocks), f"{one.resident} of {one.fit}"),
            *("" if clocks is None else f"{clocks:.0f}" for clocks in one.by_warps),
            *(f"{one.clocks:.0f}", f"{one.bytes / 1e9:.2f}", f"{one.milliseconds:.3f}"),
        )
    total = sum(one.milliseconds for one in found)
    table.add_row(case, operator, "all", *[""] * (len(WARPS) + 4), f"{total:.3f}")
    table.add_section()


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
        f"whichever is longer, on {device.name}; latencies make it longer.",
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
