# SPDX-License-Identifier: Apache-2.0
"""The CUDA device's benchmarks, on the CPU: that they run, check and judge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("typer")

import typer
from benchmarks import __main__ as command_line
from benchmarks import cuda, device, implementations, measure, results, settings
from benchmarks.__main__ import Device, Section
from benchmarks.correctness import WrongResultError, check_cuda
from benchmarks.implementations import CAUSAL_CONV1D, MAMBA_SSM
from benchmarks.results import Results, quantity
from benchmarks.settings import CudaSettings
from typer.testing import CliRunner

import mambablock

ROOT = Path(__file__).parent.parent
SMALLEST = replace(
    settings.CUDA_QUICK,
    length=32,
    channels=70,
    steps=64,
    lengths=(16, 32, 64),
    longest=128,
    longest_channels=66,
    conv_length=32,
)
ON_CPU = replace(SMALLEST, device="cpu")
SECTIONS = {
    Section.scan: cuda.measure_scan,
    Section.conv: cuda.measure_conv,
    Section.block: cuda.measure_block,
}

app = typer.Typer()
app.command()(command_line.main)


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """mamba-ssm's and causal-conv1d's functions, played by this package's."""
    compat = "mambablock.compat"
    modules = {
        "mamba_ssm.ops.selective_scan_interface": f"{compat}.mamba_ssm",
        "selective_scan_cuda": f"{compat}.mamba_ssm",
        "causal_conv1d": f"{compat}.causal_conv1d",
        "causal_conv1d_cuda": f"{compat}.causal_conv1d",
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, sys.modules[module])


@pytest.mark.usefixtures("others")
def test_checks() -> None:
    check_cuda(ON_CPU)


def targets(measured: Results) -> dict[str, tuple[str, float]]:
    return {target.what: (target.against, target.bound) for target in measured.targets}


def test_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = cuda.measure_scan(ON_CPU)
    error = "forward, L = 128, 66 channels: error"
    assert targets(measured) == {
        "forward": ("limit on an H200", 1.0),
        "backward": ("limit on an H200", 1.0),
        "forward of 64 steps in one sequence": ("in 2 sequences", 1.5),
        "backward of 64 steps in one sequence": ("in 2 sequences", 1.5),
        error: ("of the largest value", 1.0),
    }
    limits = {target.what: target.against_figure for target in measured.targets}
    assert (limits["forward"], limits["backward"]) == (0.0002, 0.0005)
    sizes = {(f["batch"], f["length"], f["channels"]) for f in measured.figures}
    assert sizes == {(2, 32, 70), (4, 16, 70), (1, 64, 70), (1, 128, 66)}


def test_conv_next_to_a_copy_of_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[Tensor] = []
    copy = cuda._copy
    monkeypatch.setattr(cuda, "_copy", lambda source: sources.append(source) or copy(source))
    assert targets(cuda.measure_conv(ON_CPU)) == {
        "forward: share of the bandwidth": (cuda.COPY, 0.85),
        "backward: share of the bandwidth": (cuda.COPY, 0.75),
    }
    elements = 2 * 32 * 70
    # Each is read and written: twice, and three times, as many as x has.
    assert [source.numel() for source in sources] == [elements, 3 * elements // 2]


def test_block() -> None:
    measured = cuda.measure_block(ON_CPU)
    assert targets(measured) == {"training step": ("its four F.linear", 1.35)}
    assert len(measured.figures) == 4


@pytest.mark.usefixtures("others")
def test_next_to_the_other_packages() -> None:
    scan, conv = targets(cuda.measure_scan(ON_CPU)), targets(cuda.measure_conv(ON_CPU))
    for passes in ("forward", "backward"):
        assert scan[f"{passes}: times faster"] == (MAMBA_SSM, 2)
        assert conv[f"{passes}: times faster"] == (CAUSAL_CONV1D, 1.2)


@pytest.mark.parametrize("from_length", [32, 64, 128])
def test_wrong_results_end_a_measurement(from_length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each size that is measured."""

    def wrong(u: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = mambablock.selective_scan(u, *args, **kwargs)
        return y * 1.1 if u.dtype == torch.bfloat16 and u.shape[1] >= from_length else y

    monkeypatch.setattr(implementations, "selective_scan", wrong)
    with pytest.raises(WrongResultError, match="forward"):
        cuda.measure_scan(ON_CPU)


class FakeEvent:
    """Its clock goes on by 5 ms with every call that is recorded between."""

    now = 0.0

    def __init__(self, enable_timing: bool = False):
        assert enable_timing
        self.time = -1.0
        self.done = False

    def record(self) -> None:
        self.time = FakeEvent.now

    def synchronize(self) -> None:
        self.done = True

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.done
        return end.time - self.time


def test_a_device_is_timed_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)

    def work(milliseconds: float) -> None:
        FakeEvent.now += milliseconds

    functions = {"a": partial(work, 5), "b": partial(work, 20)}
    timings = measure.interleave(functions, replace(SMALLEST, sample_seconds=0.1))
    assert timings.seconds("a") == pytest.approx(0.005)
    assert timings.seconds("b") == pytest.approx(0.02)


@pytest.fixture
def _a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line finds one, whose work the CPU does."""
    monkeypatch.setattr(command_line, "require_device", lambda: "9.0")
    monkeypatch.setattr(results, "_cuda_device", lambda: {"device": "a GPU", "driver": "1.2"})

    def on_cpu(function: Callable[[CudaSettings], Any], sizes: CudaSettings) -> Any:
        return function(replace(sizes, device="cpu"))

    monkeypatch.setattr(command_line, "in_fresh_process", on_cpu)
    suites = command_line.suites
    monkeypatch.setitem(suites, Device.cuda, replace(suites[Device.cuda], quick=SMALLEST))


@pytest.mark.usefixtures("_a_device")
def test_table_json_and_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--device", "cuda", "--quick", "--output", str(tmp_path)]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "device: a GPU, driver: 1.2" in outcome.stdout
    for name in (MAMBA_SSM, CAUSAL_CONV1D):
        assert f"Note: {name} can't be imported" in outcome.stdout
    saved = json.loads((tmp_path / "cuda.json").read_text())
    assert saved["machine"]["device"] == "a GPU"
    assert {target["section"] for target in saved["targets"]} == {"scan", "conv", "block"}
    plots = {"cuda_scan_length", "cuda_scan", "cuda_conv", "cuda_block"}
    assert {path.stem for path in tmp_path.glob("*.png")} == plots


@pytest.mark.usefixtures("_a_device")
def test_without_matplotlib_there_are_no_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "find_spec", lambda name: None)
    arguments = ["--device", "cuda", "--quick", "--only", "conv", "--output", str(tmp_path)]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "Note: matplotlib is not installed: there are no plots" in outcome.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["cuda.json"]


@pytest.mark.usefixtures("_a_device")
def test_nothing_is_printed_while_results_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return mambablock.causal_conv1d(x, *args, **kwargs) * 1.1

    monkeypatch.setattr(implementations, "causal_conv1d", wrong)
    outcome = CliRunner().invoke(app, ["--device", "cuda", "--quick"])
    assert outcome.exit_code == 1
    assert outcome.stdout == ""
    assert "causal_conv1d (torch.float32), forward is wrong" in outcome.stderr


no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@no_device
@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "benchmarks", "--device", "cuda"],
        [sys.executable, "-m", "benchmarks.device"],
        ["make", "gpu-check", f"PYTHON={sys.executable}"],
    ],
    ids=["benchmarks", "device", "make"],
)
def test_without_a_device_one_sentence_and_status_2(command: list[str]) -> None:
    # Not those of a make that runs the tests.
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    sentence = done.stderr.splitlines()[0]
    assert sentence.startswith(("expected a torch with CUDA; got", "expected a CUDA device; torch"))


@no_device
def test_a_required_device_that_is_missing_is_a_failure() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_updates.py", "-k", "groups"]
    for variable, status in (("UNRELATED", 0), ("MAMBABLOCK_REQUIRE_CUDA", 1)):
        environment = {**os.environ, variable: "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stdout


def test_missing_packages_are_named() -> None:
    device.require_packages("torch")
    with pytest.raises(device.NotReadyError, match=r"lacks: absent_1, absent_2$"):
        device.require_packages("absent_1", "torch", "absent_2")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (5.4e-3, "s", "5.40 ms"),
        (1.25e-4, "s", "125.00 µs"),
        (3e12, "/s", "3.00 T/s"),
        (999, "B", "999.00 B"),
        (2.93e-3, "", "0.0029"),
        (0, "s", "0.00 s"),
    ],
)
def test_quantities(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text
