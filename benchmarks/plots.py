# SPDX-License-Identifier: Apache-2.0
"""The figures as PNG files of fixed names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from .implementations import LINEARS, OURS
from .results import Results
from .scan import DEFAULT
from .settings import D_INNER, D_STATE, CudaSettings, Sampling, Settings

Series = dict[str, list[tuple[Any, float]]]


def save_plots(device: str, results: Results, folder: Path, settings: Sampling) -> None:
    # One allocator alone, that of all lengths.
    figures = [figure for figure in results.figures if figure.get("allocator") != DEFAULT]
    results = replace(results, figures=figures)
    for name, (section, draw, panels) in PLOTS[device].items():
        if results.select(section):
            figure = Figure(figsize=(6 * panels, 4.5), layout="constrained")
            draw(figure.subplots(1, panels, squeeze=False)[0], results, settings)
            figure.savefig(folder / f"{name}.png", dpi=120)


def _lines(axes: Axes, series: Series, title: str, x: str, y: str) -> None:
    for label, points in sorted(series.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = sorted({point[0] for points in series.values() for point in points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _bars(axes: Axes, values: dict[str, float], title: str, unit: str) -> None:
    """On a logarithmic axis, unless all are of one order of magnitude."""
    engineering = EngFormatter(unit, places=2)
    least, most = min(values.values()), max(values.values())
    bars = axes.barh(list(values), list(values.values()), log=most > 10 * least)
    axes.bar_label(bars, [engineering(value) for value in values.values()], padding=3)
    axes.set(title=title, xlim=(least / 3, most * 5) if most > 10 * least else (0, most * 1.4))
    axes.xaxis.set_major_formatter(EngFormatter(unit))
    axes.invert_yaxis()


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def _rate(panels: list[Axes], results: Results, settings: Settings) -> None:
    values = {f"{f['implementation']}, {f['simd']}": f["value"] for f in results.select("rate")}
    _bars(panels[0], values, f"one core, L = {settings.length}, float32", "/s")
    panels[0].set_xlabel("state-steps, or exps, per second")


def _by_length(section: str, panels: list[Axes], results: Results) -> None:
    """Nanoseconds per channel and time step, so that a flat line is linear time."""
    for panel, passes in zip(panels, _passes[section], strict=True):
        series: Series = {}
        for figure in results.select(section, dtype="float32", **{"pass": passes}):
            if figure.get("d_state", D_STATE) == D_STATE:
                label = f"{figure['implementation']}, {_threads(figure['threads'])}"
                per_step = figure["seconds"] / figure["length"] / D_INNER * 1e9
                series.setdefault(label, []).append((figure["length"], per_step))
        _lines(panel, series, f"{section} {passes}", "length", _PER_STEP)


def _cuda_scan_length(panels: list[Axes], results: Results, settings: CudaSettings) -> None:
    for panel, passes in zip(panels, _passes["conv"], strict=True):
        series: Series = {}
        for figure in results.select("scan", implementation=OURS, **{"pass": passes}):
            steps = figure["batch"] * figure["length"]
            if steps == settings.steps:
                per_step = figure["seconds"] / steps / figure["channels"] * 1e9
                series.setdefault(OURS, []).append((figure["length"], per_step))
        title = f"scan {passes}, {settings.steps:,} steps in sequences"
        _lines(panel, series, title, "length of a sequence", _PER_STEP)


def _cuda_comparison(section: str, panels: list[Axes], results: Results, length: int) -> None:
    figures = results.select(section, length=length)
    values = {f"{f['implementation']}, {f['pass']}": f["seconds"] for f in figures}
    sizes = f"B = {figures[0]['batch']}, L = {length:,}, {figures[0]['channels']:,} channels"
    _bars(panels[0], values, f"{section}, {sizes}", "s")
    panels[0].set_xlabel("bfloat16")


def _scan_sizes(panels: list[Axes], results: Results, settings: Settings) -> None:
    at_length = results.select("scan", implementation=OURS, length=settings.length)
    states: Series = {}
    types: dict[str, float] = {}
    threads = settings.threads[-1]
    for figure in at_length:
        if figure["dtype"] == "float32":
            label = f"{figure['pass']}, {_threads(figure['threads'])}"
            rate = settings.length * D_INNER * figure["d_state"] / figure["seconds"]
            states.setdefault(label, []).append((figure["d_state"], rate))
        if figure["d_state"] == D_STATE and figure["threads"] == threads:
            types[f"{figure['dtype']}, {figure['pass']}"] = figure["seconds"]
    title = f"scan, L = {settings.length}"
    _lines(panels[0], states, f"{title}, float32", "d_state", "state-steps per second")
    _bars(panels[1], dict(sorted(types.items())), f"{title}, {_threads(threads)}", "s")


def _block(panels: list[Axes], results: Results, settings: Settings) -> None:
    threads, length = settings.threads[-1], settings.length
    for panel, passes in zip(panels, ("forward", "training step"), strict=False):
        figures = results.select("block", length=length, threads=threads, **{"pass": passes})
        values = {figure["implementation"]: figure["seconds"] for figure in figures}
        _bars(panel, values, f"block {passes}, L = {length}", "s")


def _decode(panels: list[Axes], results: Results, settings: Settings) -> None:
    figures = results.select("decode", threads=settings.threads[-1])
    values = {f["implementation"]: f["value"] for f in figures if f["implementation"] != LINEARS}
    _bars(panels[0], values, "one block, one sequence: tokens per second", "")


def _model(panels: list[Axes], results: Results, settings: Settings) -> None:
    where = {"threads": settings.threads[-1], "batch": 1, "pass": "decode"}
    for panel, dtype in zip(panels, ("float32", "bfloat16"), strict=False):
        figures = results.select("model", dtype=dtype, **where)
        values = {figure["implementation"]: figure["value"] for figure in figures}
        _bars(panel, values, f"a whole model's decoding in {dtype}: tokens per second", "")


def _memory(panels: list[Axes], results: Results, settings: Settings) -> None:
    figures = results.select("memory", **{"pass": "training step"})
    values = {figure["implementation"]: figure["value"] for figure in figures}
    title = f"peak memory of a training step, L = {settings.length}"
    _bars(panels[0], values, title, "B")


_PER_STEP = "ns per channel and time step"
_passes = {"scan": ("forward", "forward + backward"), "conv": ("forward", "backward")}
PLOTS: dict[str, dict[str, tuple[str, Callable[[list[Axes], Results, Any], None], int]]] = {
    "cpu": {
        "rate": ("rate", _rate, 1),
        "scan_length": ("scan", lambda panels, results, _: _by_length("scan", panels, results), 2),
        "scan_sizes": ("scan", _scan_sizes, 2),
        "conv_length": ("conv", lambda panels, results, _: _by_length("conv", panels, results), 2),
        "block": ("block", _block, 2),
        "decode": ("decode", _decode, 1),
        "model": ("model", _model, 2),
        "memory": ("memory", _memory, 1),
    },
    "cuda": {
        "cuda_scan_length": ("scan", _cuda_scan_length, 2),
        "cuda_scan": ("scan", lambda p, r, s: _cuda_comparison("scan", p, r, s.length), 1),
        "cuda_conv": ("conv", lambda p, r, s: _cuda_comparison("conv", p, r, s.conv_length), 1),
        "cuda_block": ("block", lambda p, r, s: _cuda_comparison("block", p, r, s.length), 1),
    },
}
