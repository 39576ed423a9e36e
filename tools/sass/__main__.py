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
from .launches import Launch, record
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


if __name__ == "__main__":
    typer.run(main)
