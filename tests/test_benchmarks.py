# SPDX-License-Identifier: Apache-2.0
"""That the benchmarks run, check and compare; what they measure here means nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("typer")

import typer
from benchmarks import __main__ as command_line
from benchmarks import cuda, implementations, measure, results, settings
from benchmarks.__main__ import Device, Section, suites
from benchmarks.correctness import WrongResultError
from typer.testing import CliRunner

import mambablock
from mambablock import compat

ROOT = Path(__file__).parent.parent
SIZES = replace(settings.CUDA_QUICK, device="cpu", rounds=1)


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(command_line.main)
    return CliRunner().invoke(app, arguments)


def wrong(operator: str, at: int | None, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """At one length or at every one, in bfloat16."""
    y = getattr(mambablock, operator)(x, *args, **kwargs)
    return y * 1.02 if x.dtype == torch.bfloat16 and at in (None, x.shape[1]) else y


def die(*_: object) -> None:
    os._exit(1)


def exhaust_memory(*_: object) -> None:
    raise torch.OutOfMemoryError


def run_suites(folder: Path) -> dict[str, Any]:
    """Each with right and with wrong results, on the CPU, in forks of a process of its own."""
    import torch._dynamo  # which the first recomputation in a process imports

    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    measure.PROCESSES = multiprocessing.get_context("fork")
    command_line.require_device = lambda: "9.0"
    results._cuda_device = lambda: {"device": "a GPU"}
    sys.modules.update(dict.fromkeys(("transformers", "mambapy")))  # not to be imported
    sys.modules["mamba_ssm.ops.selective_scan_interface"] = compat.mamba_ssm
    sys.modules["causal_conv1d"] = compat.causal_conv1d
    sys.modules.update(dict.fromkeys(("selective_scan_cuda", "causal_conv1d_cuda"), compat))
    suites[Device.cuda].sections.update({Section.rate: die, Section.memory: exhaust_memory})
    found: dict[str, Any] = {}
    for device, operator in (("cpu", "selective_scan"), ("cuda", "causal_conv1d")):
        suite = suites[Device(device)]
        quick = replace(suite.quick, device="cpu", rounds=1)
        suites[Device(device)] = replace(suite, quick=quick)
        for kind, at in (("right", -1), ("wrong", None)):
            with patch.object(implementations, operator, partial(wrong, operator, at)):
                done = run("--device", device, "--quick", "--output", str(folder))
            errors = done.stderr or repr(done.exception)
            found[f"{kind} {device}"] = (done.exit_code, done.stdout, errors)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("results")
    # A single SIMD level, since a fork cannot choose another.
    level = {"MAMBABLOCK_SIMD": "baseline"}
    return {"folder": folder} | measure.in_fresh_process(run_suites, folder, environment=level)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_section_is_reported(device: str, found: dict[str, Any]) -> None:
    status, output, errors = found[f"right {device}"]
    assert status == 0, errors
    saved = json.loads((found["folder"] / f"{device}.json").read_text())
    suite = suites[Device(device)]
    sections = {section.value for section in suite.sections}
    assert {figure["section"] for figure in saved["figures"]} == sections
    assert {target["section"] for target in saved["targets"]} == sections
    values = ("seconds", "value")
    keys = [{k: v for k, v in f.items() if k not in values} for f in saved["figures"]]
    assert not [key for key in keys if keys.count(key) > 1]
    for package in suite.packages:
        assert (f"Note: {package} can't be imported" in output) == (device == "cpu")
    if "Note: matplotlib" not in output:
        from benchmarks.plots import PLOTS

        assert all((found["folder"] / f"{name}.png").exists() for name in PLOTS[device])


@pytest.mark.parametrize("section", ["rate", "memory"])
def test_a_section_whose_process_dies_is_left_out(section: str, found: dict[str, Any]) -> None:
    _, output, _ = found["right cuda"]
    assert f"Note: {section} is left out" in output


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_is_printed_while_results_are_wrong(device: str, found: dict[str, Any]) -> None:
    status, output, errors = found[f"wrong {device}"]
    assert (status, output) == (1, "")
    assert "(torch.bfloat16), forward is wrong, so nothing is measured" in errors


@pytest.mark.parametrize("length", [SIZES.length, SIZES.steps, SIZES.longest])
def test_a_wrong_result_ends_a_measurement(length: int) -> None:
    operator = partial(wrong, "selective_scan", length)
    with (
        patch.object(implementations, "selective_scan", operator),
        pytest.raises(WrongResultError, match="forward"),
    ):
        cuda.measure_scan(SIZES)


@pytest.mark.parametrize("arguments", [["--only", "sca"], ["--device", "cuda", "--only", "rate"]])
def test_unknown_section(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert arguments[-1] in done.stderr


no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@no_device
def test_without_a_device_one_sentence_and_status_2() -> None:
    # Not those of a make that runs the tests.
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    command = ["make", "gpu-check", f"PYTHON={sys.executable}"]
    make = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    measuring = run("--device", "cuda")
    for status, done in ((make.returncode, make), (measuring.exit_code, measuring)):
        assert (status, done.stdout) == (2, "")
        assert done.stderr.startswith(
            ("expected a torch with CUDA; got", "expected a CUDA device;")
        )


@no_device
def test_a_required_device_that_is_missing_is_a_failure() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_updates.py", "-k", "groups"]
    environment = os.environ | {"MAMBABLOCK_REQUIRE_CUDA": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout


def test_a_ratio_is_that_within_rounds() -> None:
    timings = measure.Timings({"a": [1.0, 10.0, 3.0], "b": [2.0, 20.0, 2.0]})
    assert timings.seconds("a") == 3.0
    assert timings.ratio("a", "b") == 0.5
