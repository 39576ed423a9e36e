# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m benchmarks --help`."""

from __future__ import annotations

import sys
from concurrent.futures.process import BrokenProcessPool
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Option

from .block import measure_block, measure_decode
from .contenders import missing_packages
from .conv import measure_conv
from .correctness import WrongResultError, check_contenders, check_layouts, check_operators
from .layout import measure_layout
from .measure import in_fresh_process
from .memory import measure_memory
from .plots import save_plots
from .rate import measure_rate
from .results import Results, bars_table, figures_table, machine
from .scan import measure_scan
from .settings import FULL, QUICK, Settings


class Section(str, Enum):
    rate = "rate"
    scan = "scan"
    conv = "conv"
    layout = "layout"
    block = "block"
    decode = "decode"
    memory = "memory"


_measure = {
    Section.rate: measure_rate,
    Section.scan: measure_scan,
    Section.conv: measure_conv,
    Section.layout: measure_layout,
    Section.block: measure_block,
    Section.decode: measure_decode,
    Section.memory: measure_memory,
}


def main(
    quick: Annotated[bool, Option(help="Small sizes and few rounds: a smoke test.")] = False,
    only: Annotated[list[Section] | None, Option(help="Sections to measure; repeatable.")] = None,
    output: Annotated[
        Path | None,
        Option(
            help="Folder for cpu.json and the plots.",
            show_default="benchmarks/results; with --quick or --only, nowhere",
        ),
    ] = None,
) -> None:
    """Measure the speed and memory of mambablock on the CPU, next to other implementations."""
    settings = QUICK if quick else FULL
    progress = Console(stderr=True)
    console = Console(width=None if sys.stdout.isatty() else 150)
    results = Results(notes=missing_packages())
    try:
        with progress.status("checking the results against the reference"):
            check_operators()
            check_layouts()
            check_contenders()
        for section in _measure:
            if not only or section in only:
                with progress.status(f"measuring: {section.value}"):
                    results.extend(_measured(section, settings))
    except WrongResultError as error:
        print(f"{error}.", file=sys.stderr)
        raise typer.Exit(1) from None

    console.print(", ".join(f"{name}: {value}" for name, value in machine().items()))
    for section in _measure:
        if results.select(section.value):
            console.print(figures_table(results, section.value))
    caption = "Not at the bars' sizes: a quick run." if quick else "Medians of interleaved rounds."
    console.print(bars_table(results.bars, caption))
    for note in results.notes:
        console.print(f"Note: {note}")
    if output is None and not quick and not only:
        output = Path(__file__).parent / "results"
    if output is not None:
        results.save(output, settings)
        save_plots(results, output, settings)


def _measured(section: Section, settings: Settings) -> Results:
    try:
        return in_fresh_process(_measure[section], settings)
    except BrokenProcessPool:
        note = f"{section.value} is left out: its process was killed, perhaps for want of memory"
        return Results(notes=[note])


if __name__ == "__main__":
    typer.run(main)
