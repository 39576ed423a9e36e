# SPDX-License-Identifier: Apache-2.0
"""Induction heads (Gu & Dao 2023, arXiv:2312.00752, section 4.1.2 and appendix E.1): train at
length 256, test up to length 2^20, the longest sequences over two processes.

A sequence is random tokens, one of them the special one; at its end the special token comes again,
and the model is to tell the token that followed it the first time.

The paper trains for 204,800 steps of 8 sequences of length 256, with the answer's cross entropy
alone. Changed here, for a training of minutes:

- The steps are fewer, of 32 sequences or more, and the rate falls in the last third.
- The length starts at 16, and doubles up to 256 whenever the answers are learned.
- Once they are at length 256, the mean of log dt is added to the loss. A token that is to leave the
  state as it is needs a time step dt of 0, but at length 256 one of 1e-4 answers as well, and the
  cross entropy alone hardly presses it further.
"""

import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from mambablock import MambaState
from mambablock.distributed import ContextParallel
from model import MambaLM

VOCABULARY, D_MODEL, LAYERS, LENGTH = 16, 64, 2, 256
SPECIAL = VOCABULARY - 1
FIRST_LENGTH, LEARNED = 16, 0.1  # learned: the mean loss of the last WINDOW steps
WINDOW, LEARNING_RATE = 50, 3e-3
PENALTY, LEAST_DT = 0.02, 1e-10  # of the mean of log dt, as far as dt is above LEAST_DT
TEST_LENGTHS = [2**k for k in range(6, 21, 2)]
PIECE = 1 << 15  # steps of a test sequence at once; states are carried
LONG = 1 << 18  # from this length on, pieces lie over two processes
PAPER = "100.0"  # percent at every length, after 204,800 steps of 8


def fail(sentence: str, status: int = 2) -> NoReturn:
    """Print why the program ends, and end it; status 2 is for bad input."""
    print(sentence, file=sys.stderr)
    sys.exit(status)


def sequences(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens (count, length) and each sequence's answer (count,), int64."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SPECIAL, (count, length), generator=generator)
    place = torch.randint(length - 2, (count,), generator=generator)
    rows = torch.arange(count)
    tokens[rows, place] = tokens[:, -1] = SPECIAL
    return tokens, tokens[rows, place + 1]


class InductionLM(MambaLM):
    def forward(
        self,
        tokens: Tensor,
        states: list[MambaState] | None = None,
        context_parallel: ContextParallel | None = None,
    ) -> tuple[Tensor, list[MambaState]]:
        """The last token's logits (batch, VOCABULARY), and the states after it."""
        x, after = self.embedding(tokens), []
        options = {"return_state": True, "context_parallel": context_parallel}
        for i, (norm, block) in enumerate(zip(self.norms, self.blocks, strict=True)):
            y, state = block(norm(x), states and states[i], **options)
            x = x + y
            after.append(state)
        return F.linear(self.final_norm(x[:, -1]), self.embedding.weight), after


@torch.inference_mode()
def accuracy(
    model: InductionLM, length: int, count: int, context_parallel: ContextParallel | None = None
) -> float:
    """The part of `count` sequences whose answer is right."""
    right, rows = 0, max(1, (1 << 17) // length)
    cp = context_parallel
    for first in range(0, count, rows):
        tokens, answers = sequences(min(rows, count - first), length, seed=(1 << 40) + first)
        states = None
        for piece in tokens.split(PIECE * (1 if cp is None else cp.size), 1):
            mine = piece if cp is None else piece.chunk(cp.size, 1)[cp.rank]
            logits, states = model(mine, states, cp)
        right += int((logits.argmax(-1) == answers).sum())
    return right / count  # of the last rank: it has the last token


def test_long(rank: int, folder: str, lengths: list[int], count: int) -> None:
    """On each of two processes."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/at", rank=rank, world_size=2)
    model = InductionLM(VOCABULARY, D_MODEL, LAYERS)
    model.load_state_dict(torch.load(f"{folder}/model"))
    cp = ContextParallel(dist.group.WORLD)
    found = {length: accuracy(model, length, count, cp) for length in lengths}
    if rank == 1:
        torch.save(found, f"{folder}/found")
    dist.barrier()
    dist.destroy_process_group()


def test(model: InductionLM, longest: int, count: int) -> dict[int, float]:
    """The accuracy by length."""
    lengths = [length for length in TEST_LENGTHS if length <= longest]
    found = {n: accuracy(model, n, 4 * count) for n in tqdm(lengths, "testing") if n < LONG}
    if long := [length for length in lengths if length >= LONG]:
        print(f"testing {len(long)} lengths over two processes")
        with tempfile.TemporaryDirectory() as folder:
            torch.save(model.state_dict(), f"{folder}/model")
            mp.spawn(test_long, (folder, long, count), nprocs=2)
            found |= torch.load(f"{folder}/found")
    return found


@dataclass
class Run:
    model: InductionLM
    optimizer: torch.optim.Adam
    seed: int
    minutes: float
    steps: int | None
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    length: int = FIRST_LENGTH
    since: int = 0  # the step from which on the length is that

    def spent(self) -> float:
        """The part of the budget that is used up: of the steps, if given, or else the minutes."""
        return len(self.losses) / self.steps if self.steps else self.seconds / 60 / self.minutes

    def save(self, path: Path) -> None:
        """Write beside `path`, then rename: `path` is whole at any time."""
        kept = {"seed": self.seed, "seconds": self.seconds, "losses": self.losses}
        kept |= {"length": self.length, "since": self.since}
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        partial = path.with_suffix(".partial")
        torch.save(kept | parts, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        try:
            kept = torch.load(path, weights_only=True)
            if kept["seed"] != self.seed:
                fail(f"{path} has seed {kept['seed']}, but this run has {self.seed}.")
            self.model.load_state_dict(kept["model"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.seconds, self.losses = kept["seconds"], kept["losses"]
            self.length, self.since = kept["length"], kept["since"]
        except Exception as error:  # a file may hold anything
            reason = str(error).partition("\n")[0]
            fail(f"{path} is missing or not a whole checkpoint: {reason}.")

    def loss(self) -> tuple[Tensor, Tensor]:
        """Of the next step: the answers' cross entropy, and what is to be minimised."""
        recent = self.losses[self.since :][-WINDOW:]
        learned = len(recent) == WINDOW and sum(recent) / WINDOW < LEARNED
        if learned and self.length < LENGTH:
            self.length, self.since, learned = 2 * self.length, len(self.losses), False
        deltas: list[Tensor] = []  # of each block; dt is their softplus
        hooks = [
            block.dt_proj.register_forward_hook(lambda module, inputs, delta: deltas.append(delta))
            for block in self.model.blocks
        ]
        seed = (self.seed << 32) + len(self.losses)
        tokens, answers = sequences(min(128, 8192 // self.length), self.length, seed)
        loss = F.cross_entropy(self.model(tokens)[0], answers)
        for hook in hooks:
            hook.remove()
        if not learned:
            return loss, loss
        dt = F.softplus(torch.stack(deltas))
        return loss, loss + PENALTY * dt.clamp_min(LEAST_DT).log().mean()

    def train(self, path: Path) -> None:
        """Spend the budget, with a checkpoint in `path`; Ctrl-C leaves one too, and exits."""
        stop: list[int] = []
        handler = signal.signal(signal.SIGINT, lambda number, _: stop.append(number))
        with tqdm(total=100, bar_format="{percentage:3.0f}%|{bar}| {elapsed}{postfix}") as bar:
            while (spent := self.spent()) < 1 and not stop:
                start, step = time.perf_counter(), len(self.losses)
                for group in self.optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * min((step + 1) / 100, 1, 3 * (1 - spent) + 0.02)
                loss, total = self.loss()
                self.optimizer.zero_grad()
                total.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.losses.append(loss.item())
                self.seconds += time.perf_counter() - start
                mean = sum(self.losses[-WINDOW:]) / len(self.losses[-WINDOW:])
                values = {"step": step + 1, "length": self.length, "loss": f"{mean:.4f}"}
                bar.set_postfix(values, refresh=False)
                bar.update(100 * min(self.spent(), 1) - bar.n)
                if int(20 * self.spent()) > int(20 * spent):
                    self.save(path)
        self.save(path)
        signal.signal(signal.SIGINT, handler)
        if stop:
            fail(f"Stopped at step {len(self.losses)}; --resume goes on from {path}.", 130)


def report(found: dict[int, float], path: Path) -> None:
    """Print the accuracies beside the paper's, and draw them."""
    print(f"{'length':>8} {'accuracy, %':>12} {'paper, %':>9}")
    for length, part in found.items():
        print(f"{length:>8} {100 * part:>12.1f} {PAPER:>9}")
    axes = (figure := Figure(layout="constrained")).subplots()
    axes.plot(list(found), [100 * part for part in found.values()], marker="o", label="this model")
    axes.plot(list(found), [100] * len(found), linestyle="--", label="Mamba in the paper")
    axes.axvline(LENGTH, color="lightgrey", label="length trained at")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="length", ylabel="accuracy, %", ylim=(0, 103))
    axes.legend()
    figure.savefig(path)


def main(
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/long"),
    minutes: Annotated[float, typer.Option(min=0.01, max=1e6, help="Time to train for.")] = 10.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to train instead.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the checkpoint.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=1 << 20)] = 0,
    longest: Annotated[int, typer.Option(min=64, help="Longest test.")] = TEST_LENGTHS[-1],
    count: Annotated[int, typer.Option(min=1, help="Test sequences; short ones: four times.")] = 16,
) -> None:
    """Train a Mamba model on induction heads at length 256, and test it up to length 2^20."""
    torch.manual_seed(seed)
    model = InductionLM(VOCABULARY, D_MODEL, LAYERS)
    run = Run(model, torch.optim.Adam(model.parameters(), fused=True), seed, minutes, steps)
    checkpoint = output / "checkpoint.pt"
    if resume:
        run.load(checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint.with_suffix(".partial").touch()  # fails now rather than after the training
    run.train(checkpoint)
    report(test(model, longest, count), output / "induction_heads.png")


if __name__ == "__main__":
    try:
        typer.run(main)
    except OSError as error:
        fail(f"Cannot use {error.filename}: {error.strerror}.")
