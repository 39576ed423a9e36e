# SPDX-License-Identifier: Apache-2.0
"""Figures, targets, and the tables and JSON made of them."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from mambablock import build_info

from .measure import Key, Timings
from .settings import Sampling, Settings

_sizes = ("batch", "length", "channels", "d_state", "weight", "dtype", "rows")
_columns = ("pass", *_sizes, "threads", "simd", "allocator")


@dataclass(frozen=True)
class Target:
    """What a figure is to be, relative to another one of the same run, or to a limit."""

    section: str
    what: str
    figure: float
    unit: str
    against: str
    against_figure: float
    ratio: float
    bound: float
    at_least: bool = False
    """Whether the ratio must be at least the bound, and not at most."""

    @property
    def met(self) -> bool:
        return self.ratio >= self.bound if self.at_least else self.ratio <= self.bound


@dataclass
class Results:
    figures: list[dict[str, Any]] = field(default_factory=list)
    """One measurement each: section, implementation, seconds (or another unit), and its sizes."""
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, section: str, implementation: str, **values: Any) -> None:
        self.figures.append({"section": section, "implementation": implementation, **values})

    def add_timings(self, section: str, timings: Timings[tuple[str, str]], **sizes: Any) -> None:
        """Of implementations and their passes."""
        for name, passes in timings.samples:
            seconds = timings.seconds((name, passes))
            self.add(section, name, **{"pass": passes}, **sizes, seconds=seconds)

    def add_target(
        self,
        section: str,
        what: str,
        figure: float,
        unit: str,
        against: str,
        against_figure: float,
        bound: float = 1.0,
    ) -> None:
        """That the figure is at most `bound` times the other one."""
        ratio = figure / against_figure
        self.targets.append(
            Target(section, what, figure, unit, against, against_figure, ratio, bound)
        )

    def add_time_target(
        self,
        section: str,
        what: str,
        timings: Timings[Key],
        names: tuple[Key, Key],
        against: str,
        bound: float,
        *,
        faster: bool = False,
    ) -> None:
        """That the first takes at most `bound` times as long as the second, or is that faster.

        Without the second, whose package may be missing, there is no target.
        """
        first, second = names
        if second not in timings.samples:
            return
        ratio = timings.ratio(second, first) if faster else timings.ratio(first, second)
        figures = (timings.seconds(first), "s", against, timings.seconds(second))
        self.targets.append(Target(section, what, *figures, ratio, bound, faster))

    def extend(self, other: Results) -> None:
        self.figures += other.figures
        self.targets += other.targets
        self.notes += [note for note in other.notes if note not in self.notes]

    def select(self, section: str, **values: Any) -> list[dict[str, Any]]:
        return [
            figure
            for figure in self.figures
            if figure["section"] == section
            and all(figure.get(name) == value for name, value in values.items())
        ]

    def save(self, path: Path, machine: dict[str, Any], settings: Sampling) -> None:
        content = {
            "machine": machine,
            "sizes": settings.sizes,
            "settings": asdict(settings),
            "notes": self.notes,
            "targets": [asdict(target) | {"met": target.met} for target in self.targets],
            "figures": self.figures,
        }
        path.write_text(json.dumps(content, indent=1) + "\n")


def at_each_thread_count(measure: Callable[[Settings], Results], settings: Settings) -> Results:
    """The figures at all counts, and the targets of the last."""
    results = Results()
    for count in settings.threads:
        torch.set_num_threads(count)
        found = measure(settings)
        for figure in found.figures:
            figure["threads"] = count
        results.extend(found if count == settings.threads[-1] else replace(found, targets=[]))
    return results


def machine(device: str, packages: tuple[str, ...]) -> dict[str, Any]:
    info = build_info()
    return (_cuda_device() if device == "cuda" else {}) | {
        "processor": _processor(),
        "cores": torch.get_num_threads(),
        "simd_level": info["simd_level"],
        "compiler": info["compiler"],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", *packages)},
    }


def _cuda_device() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties()
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "driver": _driver(),
        "cuda": {"torch": torch.version.cuda, "mambablock": build_info()["cuda"]},
    }


def _driver() -> str | None:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines.splitlines()[0]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def quantity(value: float, unit: str) -> str:
    """Such as 5.40 ms; without a unit, the number alone."""
    if not unit:
        return f"{value:.2g}"
    thousands = math.floor(math.log10(abs(value)) / 3) if value else 0
    thousands = max(-4, min(4, thousands))
    prefix = ("p", "n", "µ", "m", "", "k", "M", "G", "T")[thousands + 4]
    return f"{value / 1000**thousands:.2f} {prefix}{unit}"


def targets_table(targets: list[Target], caption: str) -> Table:
    table = Table(title="Targets", caption=caption)
    for heading in ("what", "figure", "against", "", "ratio", "target", "result"):
        table.add_column(heading, justify="right" if heading in ("figure", "", "ratio") else "left")
    for target in targets:
        table.add_row(
            f"{target.section}: {target.what}",
            quantity(target.figure, target.unit),
            target.against,
            quantity(target.against_figure, target.unit),
            f"{target.ratio:.2f}",
            f"{'≥' if target.at_least else '≤'} {target.bound:g}",
            "[green]pass" if target.met else "[red]fail",
        )
    return table


def figures_table(results: Results, section: str) -> Table:
    """One row for each size, one column for each implementation."""
    figures = results.select(section)
    columns = [c for c in _columns if any(c in figure for figure in figures)]
    implementations = list(dict.fromkeys(figure["implementation"] for figure in figures))
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for figure in figures:
        unit, value = figure.get("unit", "s"), figure.get("seconds", figure.get("value"))
        cells = rows.setdefault(tuple(figure.get(c, "") for c in columns), {})
        cells[figure["implementation"]] = quantity(value, unit)
    table = Table(*columns, title=section)
    for implementation in implementations:
        table.add_column(implementation, justify="right")
    for sizes, cells in rows.items():
        table.add_row(*map(str, sizes), *(cells.get(name, "") for name in implementations))
    return table
