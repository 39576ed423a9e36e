# SPDX-License-Identifier: Apache-2.0
"""That the benchmarks run and judge; what they measure here means nothing."""

from __future__ import annotations

import json
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

import typer
from benchmarks import __main__ as command_line
from benchmarks import implementations, settings
from benchmarks.__main__ import Device, Section
from benchmarks.block import measure_decode
from benchmarks.implementations import OURS, RECOMPUTING
from benchmarks.layout import measure_layout
from benchmarks.measure import Timings, in_fresh_process, interleave
from benchmarks.memory import kept_for_backward, scan_peak
from benchmarks.plots import save_plots
from benchmarks.results import Results, Target
from benchmarks.scan import measure_scan
from typer.testing import CliRunner

import mambablock

SMALLEST = replace(settings.QUICK, length=8, lengths=(8, 16), slow_lengths=(8,), quadratic_length=8)

app = typer.Typer()
app.command()(command_line.main)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No new process, no lasting change of this one's allocator, no optional packages."""
    monkeypatch.setattr("benchmarks.scan.keep_freed_memory", lambda: None)
    monkeypatch.setattr("benchmarks.block.keep_freed_memory", lambda: None)
    monkeypatch.setattr("benchmarks.layout.keep_freed_memory", lambda: None)
    monkeypatch.setattr(command_line, "in_fresh_process", lambda measure, *args: measure(*args))
    modules = dict.fromkeys(implementations.MODULES, ("absent",))
    monkeypatch.setattr(implementations, "MODULES", modules)
    suites = command_line.suites
    monkeypatch.setitem(suites, Device.cpu, replace(suites[Device.cpu], quick=SMALLEST))


def test_table_json_and_plot(tmp_path: Path) -> None:
    arguments = ["--quick", "--only", "decode", "--output", str(tmp_path)]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "decode: step, one sequence" in outcome.output
    saved = json.loads((tmp_path / "cpu.json").read_text())
    assert [target["section"] for target in saved["targets"]] == ["decode"]
    assert {figure["implementation"] for figure in saved["figures"]} == {
        "mambablock",
        "PyTorch loop",
        "four F.linear",
    }
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_printed_while_results_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_wrong(*args: object, **kwargs: object) -> torch.Tensor:
        return mambablock.selective_scan(*args, **kwargs) * 1.001

    monkeypatch.setattr(implementations, "selective_scan", slightly_wrong)
    outcome = CliRunner().invoke(app, ["--quick"])
    assert outcome.exit_code == 1
    assert outcome.stdout == ""
    assert "selective_scan (torch.float32), forward is wrong" in outcome.stderr


@pytest.mark.parametrize("error", [BrokenProcessPool, torch.OutOfMemoryError])
def test_a_section_whose_process_dies_is_left_out(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: object) -> Results:
        raise error

    suites = command_line.suites
    dying = replace(suites[Device.cpu], sections={Section.decode: die})
    monkeypatch.setitem(suites, Device.cpu, dying)
    outcome = CliRunner().invoke(app, ["--quick", "--only", "decode"])
    assert outcome.exit_code == 0
    assert "decode is left out" in outcome.stdout


@pytest.mark.parametrize("arguments", [["--only", "sca"], ["--device", "cuda", "--only", "rate"]])
def test_unknown_section(arguments: list[str]) -> None:
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 2
    assert arguments[-1] in outcome.stderr


def test_scan_and_its_plots(tmp_path: Path) -> None:
    results = measure_scan(SMALLEST)
    for passes in ("forward", "forward + backward"):
        lengths = {f["length"] for f in results.select("scan", **{"pass": passes})}
        assert lengths == {8, 16}
    save_plots("cpu", results, tmp_path, SMALLEST)
    assert {path.name for path in tmp_path.iterdir()} == {"scan_length.png", "scan_sizes.png"}


def test_layouts_are_compared() -> None:
    targets = measure_layout(SMALLEST).targets
    assert len(targets) == len({target.what for target in targets}) == 16
    assert {target.against for target in targets} == {"channels last", "F.conv1d + F.silu"}


def test_recomputation_keeps_less() -> None:
    kept = [in_fresh_process(kept_for_backward, name, 256) for name in (RECOMPUTING, OURS)]
    # The convolution's output and delta, each of 1536 float32 numbers a step.
    assert kept[1] - kept[0] > 0.9 * 2 * 4 * 1536 * 256


def test_peak_memory_counts_the_tensors() -> None:
    peak, tensors = in_fresh_process(scan_peak, 1024, "backward")
    # Their pages are touched, so no peak can be below them.
    assert tensors <= peak < 1.5 * tensors


def test_ratio_is_that_within_rounds() -> None:
    timings = Timings({"a": [1.0, 10.0, 3.0], "b": [2.0, 20.0, 2.0]})
    assert timings.seconds("a") == 3.0
    assert timings.ratio("a", "b") == 0.5


def test_interleave_takes_turns() -> None:
    calls: list[str] = []
    timings = interleave(
        {name: (lambda name=name: calls.append(name)) for name in "ab"},
        replace(SMALLEST, rounds=3, sample_seconds=0),
    )
    assert calls[-6:] == ["a", "b"] * 3
    assert [len(samples) for samples in timings.samples.values()] == [3, 3]


@pytest.mark.parametrize(("ratio", "at_least", "met"), [(2, True, True), (2, False, False)])
def test_target(ratio: float, at_least: bool, met: bool) -> None:
    target = Target("scan", "x", 2.0, "s", "y", 1.0, ratio, 1.5, at_least)
    assert target.met is met
    results = Results(targets=[target])
    results.extend(Results(targets=[target]))
    assert results.targets == [target, target]


def test_decode_compares_with_the_linear_layers() -> None:
    (target,) = measure_decode(SMALLEST).targets
    assert target.ratio > 0
    assert not target.at_least
