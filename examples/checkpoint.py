# SPDX-License-Identifier: Apache-2.0
"""A training run and its checkpoint: one safetensors file, whole or not there."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from model import MambaLM
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from text import InputError

from mambablock import MambaState


@dataclass
class Run:
    """All that a run needs to go on with the same bits as one that never stopped.

    `settings` is what must not change on the way; the batches are a function of it and `step`.
    """

    settings: dict[str, int | str]
    model: MambaLM
    optimizer: torch.optim.Optimizer
    states: list[MambaState] | None = None
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write to a file beside `path` and rename it, so that `path` is never half-written."""
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": t for name, t in moments.items()}
        for i, state in enumerate(self.states or []):
            tensors |= {f"states.{i}.{name}": t for name, t in state._asdict().items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        kept = {name: getattr(self, name) for name in ("settings", "step", "seconds", "held_out")}
        partial = path.with_suffix(".partial")
        save_file({k: t.contiguous() for k, t in tensors.items()}, partial, {"run": json.dumps(kept)})
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Take the run up where `path` left it; InputError if it is corrupt or of another run."""
        try:
            with safe_open(path, "pt") as file:
                kept = json.loads(file.metadata()["run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            for name, mine in self.settings.items():
                if kept["settings"][name] != mine:
                    theirs = kept["settings"][name]
                    raise InputError(f"{path} has {name} {theirs}, but this run has {mine}.")
            weights = {name: tensors[f"model.{name}"] for name in self.model.state_dict()}
            moments = {
                i: {name: tensors[f"optimizer.{i}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
                for i in range(len(list(self.model.parameters())))
            }
            self.model.load_state_dict(weights)
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
            self.states = [
                MambaState(tensors[f"states.{i}.conv"], tensors[f"states.{i}.ssm"])
                for i in range(len(self.model.blocks))
            ]
            self.losses = tensors["losses"].tolist()
            self.step, self.seconds, self.held_out = (kept[k] for k in ("step", "seconds", "held_out"))
        except FileNotFoundError as error:
            raise InputError(f"{path} does not exist, so there is nothing to resume.") from error
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path} is not a whole checkpoint of this program: {reason}.") from error
