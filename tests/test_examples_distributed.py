# SPDX-License-Identifier: Apache-2.0
"""The examples that run on several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("typer")

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch's gloo")

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = ("--d-model", "16", "--layers", "1", "--length", "64")


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(EXAMPLES)}
        | environment,
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


def torchrun(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    return python(*launcher, *arguments)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} green bottles hanging on the wall\n" for i in range(200)))
    return path


def losses(run: subprocess.CompletedProcess[str]) -> dict[int, float]:
    assert run.returncode == 0, run.stderr
    found = [line.split() for line in run.stdout.splitlines() if line.startswith("step")]
    return {int(step.rstrip(":")): float(loss) for _, step, _, loss in found}


def test_another_mesh_resumes_the_training(text: Path, tmp_path: Path) -> None:
    script = EXAMPLES / "distributed.py"
    options = (script, "--data", text, "--checkpoint", tmp_path / "checkpoint", *SIZES)
    first = losses(torchrun(2, *options, "--dp", 2, "--steps", 2))
    then = losses(torchrun(4, *options, "--cp", 2, "--tp", 2, "--steps", 4, "--resume"))
    whole = losses(torchrun(1, *options, "--steps", 4))
    assert list(first) == [1, 2]
    assert list(then) == [3, 4]
    # Printed with four decimals, of float32 sums in other orders.
    assert whole == pytest.approx(first | then, abs=2e-3)
    assert len(set(whole.values())) == 4


def test_a_rank_that_fails_ends_the_others(text: Path, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(
        "import os, typer, distributed\n"
        "def fail(*_):\n    raise RuntimeError('no bottles on rank 1')\n"
        "if os.environ['RANK'] == '1':\n    distributed.batch_of = fail\n"
        "typer.run(distributed.main)\n"
    )
    run = torchrun(2, script, "--data", text, "--checkpoint", tmp_path / "c", "--cp", 2, *SIZES)
    assert run.returncode != 0
    assert "no bottles on rank 1" in run.stderr


def test_a_mesh_of_other_than_all_processes(text: Path) -> None:
    run = torchrun(1, EXAMPLES / "distributed.py", "--data", text, "--cp", 3)
    assert run.returncode != 0
    assert "dp * cp * tp must be 1 processes; got 1 * 3 * 1" in run.stderr


def test_induction_heads_over_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "short.py"
    script.write_text(
        "import os, signal, typer, induction_heads\n"
        "induction_heads.LONG = 256\n"
        "induction_heads.TEST_LENGTHS = [64, 256, 1024]\n"
        "drawn = induction_heads.sequences\n"
        "def interrupted(count, length, seed):\n"
        "    if seed == 1 and os.environ.get('INTERRUPT'):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    return drawn(count, length, seed)\n"
        "induction_heads.sequences = interrupted\n"
        "if __name__ == '__main__':\n    typer.run(induction_heads.main)\n"
    )
    options = (script, "--output", tmp_path, "--longest", 1024, "--count", 2)
    stopped = python(*options, "--steps", 4, INTERRUPT="1")
    assert stopped.returncode == 130, stopped.stderr
    assert "Stopped at step 2; --resume goes on from" in stopped.stderr
    run = python(*options, "--steps", 4, "--resume")
    assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines()[-3:]] == ["64", "256", "1024"]
    assert (tmp_path / "induction_heads.png").read_bytes().startswith(b"\x89PNG")
    assert len(torch.load(tmp_path / "checkpoint.pt")["losses"]) == 4
    other = python(*options, "--steps", 5, "--resume", "--seed", 1)
    assert other.returncode == 2
    assert "has seed 0, but this run has 1." in other.stderr
