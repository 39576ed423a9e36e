# SPDX-License-Identifier: Apache-2.0
"""Text as bytes: reading a file or folder, holding a part out, cutting training batches."""

import random
import sysconfig
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor

HELD_OUT_BYTES = 1 << 20


class InputError(click.ClickException):
    """Something the user gave cannot be used: one sentence on stderr, exit status 2."""

    exit_code = 2


def read_documents(path: Path | None) -> list[bytes]:
    """The text files at `path`, a file or folder; by default Python's own standard library."""
    root = path or Path(sysconfig.get_path("stdlib"))
    pattern, skipped = ("*", set[str]()) if path else ("*.py", {"site-packages", "test", "tests"})
    try:
        files = [root]
        if root.is_dir():
            parts = {f: f.relative_to(root).parts for f in root.rglob(pattern) if f.is_file()}
            hidden = {f for f, names in parts.items() if any(n.startswith(".") for n in names)}
            files = sorted(f for f in parts if f not in hidden and not skipped & set(parts[f]))
        documents = [f.read_bytes() for f in files]
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}.") from error
    if not root.is_dir() and b"\0" in documents[0]:
        offset = documents[0].index(b"\0")
        raise InputError(f"{root} is binary, not text: it has a NUL byte at offset {offset}.")
    documents = [d for d in documents if d and b"\0" not in d]
    if not documents:
        raise InputError(f"{root} {'holds no text' if root.is_dir() else 'is empty'}.")
    return documents


def hold_out(documents: list[bytes], seed: int) -> tuple[bytes, bytes]:
    """Shuffle and part into training and held-out text: whole files, or else the last tenth."""
    documents = random.Random(seed).sample(documents, len(documents))
    room = min(HELD_OUT_BYTES, sum(map(len, documents)) // 10)
    training, held_out, taken = [], [], 0
    for document in documents:
        fits = taken + len(document) <= room
        (held_out if fits else training).append(document)
        taken += fits * len(document)
    if not held_out:
        training, held_out = [documents[0][:-room], *documents[1:]], [documents[0][-room:]]
    return b"".join(training), b"".join(held_out)


def training_batch(text: Tensor, step: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (batch, length) int64 of one step, a function of `step` alone.

    Row b reads on where it stopped at the step before, so that states can be carried, from
    b / batch of the text onwards and round its end.
    """
    starts = torch.arange(batch) * (len(text) // batch) + step * length
    window = text[(starts[:, None] + torch.arange(length + 1)) % len(text)].long()
    return window[:, :-1], window[:, 1:]


def evaluation_streams(text: Tensor, streams: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (streams, ceil(len(text) / streams)) int64: every byte is a target once.

    The input is the byte before, a newline for the first; padding has the target -100, which
    cross_entropy ignores.
    """
    targets = F.pad(text.long(), (0, -len(text) % streams), value=-100).view(streams, -1)
    inputs = F.pad(text.long(), (1, -len(text) % streams), value=ord("\n"))[:-1]
    return inputs.view(streams, -1), targets
