# SPDX-License-Identifier: Apache-2.0
"""Train a byte-level Mamba language model on text, measure it, and let it write."""

import gzip
import lzma
import math
import signal
import tempfile
import threading
import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from checkpoint import Run
from matplotlib.figure import Figure
from model import MambaLM
from text import InputError, evaluation_streams, hold_out, read_documents, training_batch
from torch import Tensor
from tqdm import tqdm

SEED = 0
EVALUATIONS = 10
SAMPLE_BYTES = 1 << 15


def train(run: Run, text: Tensor, sample: Tensor, budget, checkpoint: Path) -> bool:
    """Train until the budget is spent or Ctrl-C is pressed; say whether it was spent."""
    stop = threading.Event()
    previous = signal.signal(signal.SIGINT, lambda *_: stop.set())
    model, optimizer = run.model, run.optimizer
    started = time.perf_counter() - run.seconds
    with tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar}| {elapsed}{postfix}") as bar:
        while (spent := run.step / steps if steps else run.seconds / (60 * minutes)) < 1 and not stop.is_set():
            for group in run.optimizer.param_groups:
                group["lr"] = lr * min(1, spent / WARM_UP) * (1 - spent)
            inputs, targets = training_batch(text, run.step, *)
            logits, states = model(inputs, run.states)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            run.states = [MambaState(*(t.detach() for t in state)) for state in states]
            run.losses.append(loss.item())
            run.step += 1
            run.seconds = time.perf_counter() - started
    signal.signal(signal.SIGINT, previous)
