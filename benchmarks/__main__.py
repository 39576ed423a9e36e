# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m benchmarks --help`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from typer import Option

from . import cuda
from .block import measure_block, measure_decode
from .conv import measure_conv
from .correctness import WrongResultError, check_cpu, check_cuda
from .device import NotReadyError, require_device
from .distributed import measure_distributed
from .implementations import CAUSAL_CONV1D, MAMBA_SSM, MAMBAPY, TRANSFORMERS, importable
from .layout import measure_layout
from .linear import measure_linear
from .measure import in_fresh_process
from .memory import measure_memory
from .model import measure_model
from .rate import measure_rate
from .results import Results, figures_table, machine, targets_table
from .scan import measure_scan
from .settings import CUDA_FULL, CUDA_QUICK, FULL, QUICK, Sampling


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


class Section(str, Enum):
    rate = "rate"
    scan = "scan"
    conv = "conv"
    layout = "layout"
    block = "block"
    decode = "decode"
    linear = "linear"
    model = "model"
    memory = "memory"
    distributed = "distributed"


@dataclass(frozen=True)
class Suite:
    """The benchmarks of a device."""

    packages: tuple[str, ...]
    check: Callable[..., None]
    sections: dict[Section, Callable[..., Results]]
    full: Sampling
    quick: Sampling


suites = {
    Device.cpu: Suite(
        (TRANSFORMERS, MAMBAPY),
        check_cpu,
        {
            Section.rate: measure_rate,
            Section.scan: measure_scan,
            Section.conv: measure_conv,
            Section.layout: measure_layout,
            Section.block: measure_block,
            Section.decode: measure_decode,
            Section.linear: measure_linear,
            Section.model: measure_model,
            Section.memory: measure_memory,
            Section.distributed: measure_distributed,
        },
        FULL,
        QUICK,
    ),
    Device.cuda: Suite(
        (MAMBA_SSM, CAUSAL_CONV1D),
        check_cuda,
        {
            Section.scan: cuda.measure_scan,
            Section.conv: cuda.measure_conv,
            Section.block: cuda.measure_block,
        },
        CUDA_FULL,
        CUDA_QUICK,
    ),
}


def main(
    device: Annotated[Device, Option(help="Where to measure.")] = Device.cpu,
    quick: Annotated[bool, Option(help="Small sizes and few rounds: a smoke test.")] = False,
    only: Annotated[list[Section] | None, Option(help="Sections to measure; repeatable.")] = None,
    output: Annotated[
        Path | None,
        Option(
            help="Folder for cpu.json or cuda.json, and the plots.",
            show_default="benchmarks/results; with --quick or --only, nowhere",
        ),
    ] = None,
) -> None:
    """Measure the speed and memory of mambablock next to other implementations."""
    suite = suites[device]
    settings = suite.quick if quick else suite.full
    if other := [section.value for section in only or () if section not in suite.sections]:
        raise typer.BadParameter(f"--only {other[0]} is not measured with --device {device.value}")
    progress = Console(stderr=True)
    console = Console(width=None if sys.stdout.isatty() else 150)
    missing = [name for name in suite.packages if not importable(name)]
    results = Results(notes=[f"{name} can't be imported: it is left out" for name in missing])
    try:
        if device is Device.cuda:
            require_device()
        with progress.status("checking the results against the reference"):
            in_fresh_process(suite.check, settings)
        for section, measure in suite.sections.items():
            if not only or section in only:
                with progress.status(f"measuring: {section.value}"):
                    results.extend(_measured(section, measure, settings))
    except (NotReadyError, WrongResultError) as error:
        print(f"{error}.", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, NotReadyError) else 1) from None

    facts = machine(device.value, suite.packages)
    console.print(", ".join(f"{name}: {value}" for name, value in facts.items()))
    for section in suite.sections:
        if results.select(section.value):
            console.print(figures_table(results, section.value))
    caption = (
        "Not at the targets' sizes: a quick run." if quick else "Medians of interleaved rounds."
    )
    console.print(targets_table(results.targets, caption))
    plots = find_spec("matplotlib") is not None
    if not plots:
        results.notes.append("matplotlib is not installed: there are no plots")
    for note in results.notes:
        console.print(f"Note: {note}")
    if output is None and not quick and not only:
        output = Path(__file__).parent / "results"
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        results.save(output / f"{device.value}.json", facts, settings)
        if plots:
            from .plots import save_plots

            save_plots(device.value, results, output, settings)


def _measured(section: Section, measure: Callable[..., Results], settings: Sampling) -> Results:
    try:
        return in_fresh_process(measure, settings)
    except (BrokenProcessPool, torch.OutOfMemoryError):
        note = f"{section.value} is left out: its process ended early, perhaps out of memory"
        return Results(notes=[note])


if __name__ == "__main__":
    typer.run(main)
