# SPDX-License-Identifier: Apache-2.0
"""The examples: figures, checkpoints, and one sentence for what they cannot use."""

import importlib
import json
import math
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("typer")
import typer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT = EXAMPLES / "train_language_model.py"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} green bottles hanging on the wall\n" for i in range(200)))
    return path


@pytest.fixture
def command(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run the script with a tiny model on the tiny text; return its status, stdout and stderr."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(*arguments: object) -> tuple[int, str, str]:
        small = ("--data", text, "--output", text.parent / "run", "--d-model", 16, "--layers", 1)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, (*small, *arguments))])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("train_language_model")


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C in the midst of a training step."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def clip_and_interrupt(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == steps:
            signal.raise_signal(signal.SIGINT)
        return clip(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_interrupt)


def test_the_script_trains_measures_plots_and_writes(text: Path) -> None:
    output = text.parent / "new" / "run"
    small = ["--d-model", "16", "--layers", "1", "--steps", "20", "--prompt", "7 green"]
    done = subprocess.run(
        [sys.executable, SCRIPT, "--data", text, "--output", output, *small],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in ("gzip -9", "xz -9", "this model", "7 green", "tokens/s"):
        assert name in done.stdout
    for name in ("loss=", "bits/byte=", "tokens/s="):
        assert name in done.stderr
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoint.safetensors",
        "curves.png",
    ]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_minutes_bound_the_training(command: Command, text: Path) -> None:
    status, out, _ = command("--minutes", 0.01)
    assert status == 0
    assert "this model" in out
    with safe_open(text.parent / "run" / "checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["run"])["seconds"] >= 0.6


def test_resumed_run_has_the_bits_of_an_uninterrupted_one(
    command: Command, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = text.parent / "whole", text.parent / "parted"
    assert command("--output", whole, "--steps", 12)[0] == 0
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        status, _, err = command("--output", parted, "--steps", 12)
    assert status == 130
    assert "Stopped at step 5; --resume goes on" in err
    assert [path.name for path in parted.iterdir()] == ["checkpoint.safetensors"]
    assert command("--output", parted, "--steps", 12, "--resume")[0] == 0

    records = []
    for folder in (whole, parted):
        with safe_open(folder / "checkpoint.safetensors", "pt") as file:
            records.append(json.loads(file.metadata()["run"]))
    assert records[0]["losses"] == records[1]["losses"]
    assert records[0]["held_out"] == records[1]["held_out"]
    expected = load_file(whole / "checkpoint.safetensors")
    got = load_file(parted / "checkpoint.safetensors")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


def test_finished_run_resumes_with_a_larger_budget(command: Command, text: Path) -> None:
    command("--steps", 4)
    assert command("--steps", 4, "--resume")[0] == 0
    assert command("--steps", 6, "--resume")[0] == 0
    with safe_open(text.parent / "run" / "checkpoint.safetensors", "pt") as file:
        record = json.loads(file.metadata()["run"])
    assert len(record["losses"]) == 6
    assert [step for step, _ in record["held_out"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_failed_save_keeps_the_checkpoint_before(
    command: Command, text: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    command("--steps", 2)
    checkpoint = text.parent / "run" / "checkpoint.safetensors"
    before = checkpoint.read_bytes()

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        message = "No space left on device"
        raise OSError(28, message, str(path)) if error is OSError else error(message)

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        status, _, err = command("--steps", 3)
    assert status == 2
    assert "No space left on device" in err
    assert "Traceback" not in err
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "No such file or directory"),
        (b"", "holds nothing"),
        (b"a few words", "is too short: it has 11 bytes of text, less than 2560"),
        (b"PK\x03\x04\0\0" * 1000, "holds binary data, with NUL bytes"),
    ],
    ids=["missing", "empty", "short", "binary"],
)
def test_data_that_is_no_text(
    command: Command, tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    path = tmp_path / "data"
    if content is not None:
        path.write_bytes(content)
    status, out, err = command("--data", path)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert str(path) in err
    assert sentence in err
    assert not (tmp_path / "run").exists()


def test_folder_without_text(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "config").write_text("x" * 5000)
    status, _, err = command("--data", folder)
    assert (status, err) == (2, f"{folder} holds nothing.\n")


@pytest.mark.parametrize("output", ["text.txt", "text.txt/run", "/proc/nowhere/run"])
def test_output_that_cannot_be_written(command: Command, tmp_path: Path, output: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    status, out, err = command("--output", tmp_path / output)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("Cannot use ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "checkpoint.partial", "curves.png"])
@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_folder_in_the_place_of_a_result(
    command: Command, tmp_path: Path, name: str, resume: tuple[str, ...]
) -> None:
    command("--steps", 1)
    path = tmp_path / "run" / name
    path.unlink(missing_ok=True)
    path.mkdir()
    before = sorted(tmp_path.rglob("*"))
    status, out, err = command("--steps", 2, *resume)
    assert (status, out, err) == (2, "", f"Cannot use {path}: Is a directory.\n")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        *(("--minutes", value) for value in ("inf", "nan", "-1", "0", "soon")),
        *(("--steps", value) for value in (0, -1, 2.5)),
        *(("--d-model", value) for value in (0, -16, 8.5, "wide")),
        *(("--layers", value) for value in (0, -1)),
        ("--width", 3),
    ],
)
def test_bad_options(command: Command, tmp_path: Path, arguments: tuple[object, ...]) -> None:
    before = sorted(tmp_path.rglob("*"))
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert str(arguments[0]) in err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_prompt_may_be_no_text(command: Command) -> None:
    status, out, _ = command("--steps", 1, "--prompt", os.fsdecode(b"\xff\xfe"))
    assert status == 0
    assert "\ufffd\ufffd" in out


@pytest.mark.parametrize("option", ["--layers", "--width", "--batch", "--prompt", "--tokens"])
@pytest.mark.parametrize("value", ["-1", "0", "1.5", "many"])
def test_bad_options_of_hugging_face(option: str, value: str) -> None:
    pytest.importorskip("transformers")
    main = runpy.run_path(str(EXAMPLES / "hugging_face.py"))["main"]
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, [option, value])
    assert done.exit_code == 2
    assert option in done.output


@pytest.mark.parametrize("arguments", [[], ["missing"], ["text.txt"], [".", "."]])
def test_export_to_what_is_no_folder(
    text: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = str(EXAMPLES / "cpp" / "export.py")
    monkeypatch.chdir(text.parent)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(script, run_name="__main__")
    expected = f"FOLDER must be one folder that exists; got {arguments}.\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "cut", "noise", "foreign", "incomplete", "number"]
)
def test_checkpoint_that_is_not_whole(command: Command, text: Path, kind: str) -> None:
    command("--steps", 1)
    checkpoint = text.parent / "run" / "checkpoint.safetensors"
    content = checkpoint.read_bytes()
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
    if kind == "missing":
        checkpoint.unlink()
    elif kind == "foreign":
        save_file({"weight": torch.zeros(3)}, checkpoint)
    elif kind == "number":
        save_file({"weight": torch.zeros(3)}, checkpoint, {"run": "5"})
    elif kind == "incomplete":
        save_file({"weight": torch.zeros(3)}, checkpoint, metadata)
    else:
        kept = {"empty": b"", "cut": content[:-100], "noise": bytes(range(256)) * 40}
        checkpoint.write_bytes(kept[kind])
    before = {path: path.read_bytes() for path in text.parent.rglob("*") if path.is_file()}
    status, out, err = command("--resume", "--steps", 2)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"{checkpoint} is missing or not a whole checkpoint: " in err
    after = {path: path.read_bytes() for path in text.parent.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--d-model", 32), "has d_model 16, but this run has 32."),
        (("--layers", 2), "has layers 1, but this run has 2."),
        (("--data", SCRIPT), "has text crc32 "),
    ],
)
def test_checkpoint_of_another_run(
    command: Command, arguments: tuple[object, ...], sentence: str
) -> None:
    command("--steps", 1)
    status, out, err = command("--resume", "--steps", 2, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert sentence in err


def test_folder_is_read_without_hidden_and_binary_files(script: ModuleType, tmp_path: Path) -> None:
    for name, content in {
        "a.txt": b"a" * 3000,
        "below/b.md": b"b" * 4000,
        "below/.hidden": b"c" * 5000,
        "binary": b"\0" * 6000,
        "empty": b"",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    training, held_out = script.read_text(tmp_path)
    assert len(held_out) == 700  # a tenth
    joined = torch.cat([training, held_out]).numpy().tobytes()
    assert joined in (b"a" * 3000 + b"b" * 4000, b"b" * 4000 + b"a" * 3000)
    assert all(map(torch.equal, (training, held_out), script.read_text(tmp_path)))


def test_standard_library_is_the_default_text(script: ModuleType) -> None:
    training, held_out = script.read_text(None)
    assert len(training) > 5_000_000
    assert len(held_out) == 1 << 20


def test_bits_per_byte_counts_every_byte_once(script: ModuleType) -> None:
    torch.manual_seed(0)
    model = script.MambaLM(256, 16, 1)
    text = torch.randint(256, (101,))
    before = torch.cat([torch.tensor([ord("\n")]), text[:-1]])
    nats = 0.0
    for inputs, targets in zip(before.split(21), text.split(21), strict=True):  # ceil(101 / 5)
        logits, _ = model(inputs[None])
        nats += F.cross_entropy(logits[0], targets, reduction="sum").item()
    got = script.bits_per_byte(model, text.to(torch.uint8), rows=5, length=7)
    # The states are float32 and the sums have another order.
    assert got == pytest.approx(nats / 101 / math.log(2), rel=1e-5)


def test_step_and_pieces_give_the_logits_of_forward(script: ModuleType) -> None:
    torch.manual_seed(0)
    model = script.MambaLM(256, 16, 2)
    tokens = torch.randint(256, (3, 12))
    with torch.no_grad():
        expected, _ = model(tokens)
        logits, states = model(tokens[:, :5])
        pieces = [logits, model(tokens[:, 5:9], states)[0]]
        _, states = model(tokens[:, :9])
        steps = [model.step(tokens[:, t], states) for t in range(9, 12)]
    # Float32 with another order of summation in the matrix products.
    torch.testing.assert_close(torch.cat(pieces, 1), expected[:, :9], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(steps, 1), expected[:, 9:], rtol=1e-4, atol=1e-5)
