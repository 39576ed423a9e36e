# SPDX-License-Identifier: Apache-2.0
"""Train a byte-level Mamba language model on text, compare it with gzip and xz, generate text."""

import gzip
import json
import lzma
import math
import os
import random
import signal
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NoReturn
from zlib import crc32

import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from model import MambaLM

SEED, BATCH, LENGTH, LEARNING_RATE = 0, 4, 256, 6e-3


def fail(sentence: str, status: int = 2) -> NoReturn:
    """Print why the program ends, and end it; status 2 is for bad input."""
    print(sentence, file=sys.stderr)
    sys.exit(status)


def read_text(path: Path | None) -> tuple[Tensor, Tensor]:
    """Training and held-out bytes of a file or folder, by default Python's standard library."""
    root = (path or Path(sysconfig.get_path("stdlib"))).absolute()
    skipped = ("/.",) if path else ("/.", "/test", "/site-packages/", "/dist-packages/")
    found = sorted(root.rglob("*" if path else "*.py")) if root.is_dir() else [root]
    names = {f: f.as_posix().removeprefix(root.as_posix()) for f in found if not f.is_dir()}
    contents = [f.read_bytes() for f in names if not any(part in names[f] for part in skipped)]
    texts = [content for content in contents if b"\0" not in content]
    if not any(texts):
        fail(f"{root} holds {'binary data, with NUL bytes' if any(contents) else 'nothing'}.")
    random.Random(SEED).shuffle(texts)
    text = torch.frombuffer(bytearray().join(texts), dtype=torch.uint8)
    if len(text) < 10 * LENGTH:
        fail(f"{root} is too short: it has {len(text)} bytes of text, less than {10 * LENGTH}.")
    held_out = min(len(text) // 10, 1 << 20)
    return text[:-held_out], text[-held_out:]


def training_batch(text: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (BATCH, LENGTH) int64, a function of `step` alone."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=generator)
    window = text[starts + torch.arange(LENGTH + 1)].long()
    return window[:, :-1], window[:, 1:]


@torch.inference_mode()
def bits_per_byte(model: MambaLM, text: Tensor, rows: int = 16, length: int = 512) -> float:
    """Mean cost of the bytes of `text` (n,), read in `rows` parts with the states carried."""
    padding = -len(text) % rows
    targets = F.pad(text.long(), (0, padding), value=-100).view(rows, -1)  # -100: not counted
    inputs = F.pad(text.long(), (1, padding), value=ord("\n"))[:-1].view(rows, -1)
    states, nats = None, 0.0
    for x, y in zip(inputs.split(length, 1), targets.split(length, 1), strict=True):
        logits, states = model(x, states)
        nats += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    return nats / len(text) / math.log(2)


@torch.inference_mode()
def write(model: MambaLM, prompt: str, count: int = 500, temperature: float = 0.7) -> None:
    """Print the prompt and the model's continuation, sampled byte by byte with step()."""
    tokens = list(b"\n" + os.fsencode(prompt))  # it may be no UTF-8
    logits, states = model(torch.tensor([tokens]))
    logits, start = logits[:, -1], time.perf_counter()
    for _ in range(count):
        token = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
        tokens.append(int(token))
        logits = model.step(token, states)
    speed = count / (time.perf_counter() - start)
    print(f"{bytes(tokens).decode(errors='replace')}\n\nwritten at {speed:,.0f} tokens/s")


@dataclass
class Run:
    """What a resumed run needs to give the bits of one that never stopped."""

    model: MambaLM
    optimizer: torch.optim.Adam
    settings: dict[str, int]
    minutes: float
    steps: int | None
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # one a step
    held_out: list[tuple[int, float]] = field(default_factory=list)  # step, bits per byte

    def spent(self) -> float:
        """The part of the budget that is used up: of the steps, if given, or else the minutes."""
        return len(self.losses) / self.steps if self.steps else self.seconds / 60 / self.minutes

    def save(self, path: Path) -> None:
        """Write beside `path`, then rename: `path` is whole at any time."""
        tensors = {f"value/{name}": p.data for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            tensors |= {f"{k}/{name}": t for k, t in self.optimizer.state[parameter].items()}
        kept = {k: v for k, v in vars(self).items() if k not in ("model", "optimizer")}
        partial = path.with_suffix(".partial")
        try:
            save_file(tensors, partial, {"run": json.dumps(kept)})
        except SafetensorError as error:
            fail(f"Cannot write {partial}: {error}.")
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Resume from `path`, if it is a whole checkpoint of the same settings."""
        try:
            with safe_open(path, "pt") as file:
                kept = json.loads((file.metadata() or {})["run"])
                for key, value in self.settings.items():
                    if (other := kept["settings"][key]) != value:
                        fail(f"{path} has {key} {other}, but this run has {value}.")
                for name, parameter in self.model.named_parameters():
                    parameter.data.copy_(file.get_tensor(f"value/{name}"))
                    for moment in ("step", "exp_avg", "exp_avg_sq"):
                        tensor = file.get_tensor(f"{moment}/{name}")
                        self.optimizer.state[parameter][moment] = tensor
            for key in ("seconds", "losses", "held_out"):
                setattr(self, key, kept[key])
        except Exception as error:  # a file may hold anything
            reason = str(error).partition("\n")[0]
            fail(f"{path} is missing or not a whole checkpoint: {reason}.")

    def train(self, text: Tensor, sample: Tensor, path: Path) -> None:
        """Spend the budget, with a checkpoint in `path`; Ctrl-C leaves one too, and exits."""
        stop: list[int] = []
        handler = signal.signal(signal.SIGINT, lambda number, _: stop.append(number))
        with tqdm(total=100, bar_format="{percentage:3.0f}%|{bar}| {elapsed}{postfix}") as bar:
            while (spent := self.spent()) < 1 and not stop:  # Ctrl-C waits for the step's end
                start = time.perf_counter()
                for group in self.optimizer.param_groups:  # linear warm-up, then linear decay
                    group["lr"] = LEARNING_RATE * min(50 * spent, 1 - spent)
                inputs, targets = training_batch(text, len(self.losses))
                loss = F.cross_entropy(self.model(inputs)[0].flatten(0, 1), targets.flatten())
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.losses.append(loss.item())
                self.seconds += time.perf_counter() - start
                nats = sum(self.losses[-50:]) / len(self.losses[-50:])
                speed = len(self.losses) * inputs.numel() / self.seconds
                rates = {"loss": nats, "bits/byte": nats / math.log(2), "tokens/s": round(speed)}
                bar.set_postfix(rates, refresh=False)
                bar.update(100 * min(self.spent(), 1) - bar.n)
                if int(10 * self.spent()) > int(10 * spent):
                    self.held_out.append((len(self.losses), bits_per_byte(self.model, sample)))
                    self.save(path)
        self.save(path)
        signal.signal(signal.SIGINT, handler)
        if stop:
            fail(f"Stopped at step {len(self.losses)}; --resume goes on from {path}.", 130)

    def plot(self, baselines: dict[str, float], path: Path) -> None:
        """Draw bits per byte against the step, those of the compressors as lines."""
        axes = (figure := Figure(layout="constrained")).subplots()
        axes.plot([loss / math.log(2) for loss in self.losses], color="lightgrey", label="training")
        axes.plot(*zip(*self.held_out, strict=True), marker="o", label="held out")
        for style, (name, bits) in zip(("--", ":"), baselines.items(), strict=True):
            axes.axhline(bits, linestyle=style, label=name)
        axes.set(xlabel="step", ylabel="bits per byte", ylim=(1, 4))
        axes.legend()
        figure.savefig(path)


def main(
    data: Annotated[Path | None, typer.Option(help="Text file or folder.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(min=0.01, max=1e6, help="Time to train for.")] = 3.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to train instead.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the checkpoint.")] = False,
    prompt: Annotated[str, typer.Option(help="What the generated text starts with.")] = "def ",
    d_model: Annotated[int, typer.Option(min=1)] = 128,
    layers: Annotated[int, typer.Option(min=1)] = 4,
) -> None:
    """Train a byte-level Mamba language model on text, compare it with gzip, generate text."""
    text, held_out = read_text(data)
    torch.manual_seed(SEED)
    model = MambaLM(256, d_model, layers)
    settings = {"d_model": d_model, "layers": layers, "text crc32": crc32(text.numpy().tobytes())}
    run = Run(model, torch.optim.Adam(model.parameters(), fused=True), settings, minutes, steps)
    checkpoint, curves = output / "checkpoint.safetensors", output / "curves.png"
    for path in (checkpoint, curves, checkpoint.with_suffix(".partial")):
        if path.is_dir():  # found now rather than after the training
            fail(f"Cannot use {path}: Is a directory.")
    if resume:
        run.load(checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint.with_suffix(".partial").touch()  # fails now rather than after the training
    run.train(text, held_out[: 1 << 16], checkpoint)
    raw = held_out.numpy().tobytes()
    packed = {"gzip -9": gzip.compress(raw, 9), "xz -9": lzma.compress(raw, preset=9)}
    bits = {name: 8 * len(data) / len(raw) for name, data in packed.items()}
    run.plot(bits, curves)
    bits["this model"] = bits_per_byte(model, held_out)
    print("Held-out bits per byte:", ", ".join(f"{name} {cost:.3f}" for name, cost in bits.items()))
    write(model, prompt)


if __name__ == "__main__":
    try:
        typer.run(main)
    except OSError as error:
        fail(f"Cannot use {error.filename}: {error.strerror}.")
