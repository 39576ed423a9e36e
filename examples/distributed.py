# SPDX-License-Identifier: Apache-2.0
"""Train the demo's language model on several processes, over a mesh of data parallel (dp), context
parallel (cp) and tensor parallel (tp) ranks:

    torchrun --nproc-per-node 4 examples/distributed.py --dp 1 --cp 2 --tp 2
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from mambablock.distributed import ContextParallel, TensorParallel
from model import MambaLM
from train_language_model import read_text

# Checkpoints hold whole tensors, so that they load on any mesh.
WHOLE = StateDictOptions(full_state_dict=True)


class ShardedLM(MambaLM):
    """MambaLM, given a shard of each sequence."""

    def forward(self, tokens: Tensor, context_parallel: ContextParallel) -> Tensor:
        x = self.embedding(tokens)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x), context_parallel=context_parallel)
        return F.linear(self.final_norm(x), self.embedding.weight)


def make_model(mesh: DeviceMesh, d_model: int, layers: int) -> nn.Module:
    """Channels over tp; parameters over dp and cp, whose gradients add up alike."""
    torch.manual_seed(0)
    model = ShardedLM(256, d_model, layers)
    if mesh["tp"].size() > 1:
        parallelize_module(model, mesh["tp"], {"blocks.*": TensorParallel()})
    ranks = mesh["dp", "cp"]._flatten("dp_cp")
    for block in model.blocks:
        fully_shard(block, mesh=ranks, shard_placement_fn=TensorParallel.shard_placement_fn)
    return fully_shard(model, mesh=ranks)


def batch_of(text: Tensor, step: int, batch: int, length: int, mesh: DeviceMesh) -> list[Tensor]:
    """This rank's rows and piece of the inputs and the targets; the whole is the same on any
    mesh."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
    window = text[starts + torch.arange(length + 1)].long()
    dp, cp = mesh["dp"], mesh["cp"]
    rows = window.chunk(dp.size())[dp.get_local_rank()]
    return [
        t.chunk(cp.size(), 1)[cp.get_local_rank()].contiguous() for t in (rows[:, :-1], rows[:, 1:])
    ]


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    parameters, moments = get_state_dict(model, optimizer, options=WHOLE)
    dcp.save({"model": parameters, "optimizer": moments, "step": step}, checkpoint_id=path)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    parameters, moments = get_state_dict(model, optimizer, options=WHOLE)
    saved = {"model": parameters, "optimizer": moments, "step": 0}
    dcp.load(saved, checkpoint_id=path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=WHOLE,
    )
    return saved["step"]


@record  # torchrun then tells the message of the rank that failed first, and ends the others
def main(
    dp: Annotated[int, typer.Option(min=1, help="Ranks that share the batch.")] = 1,
    cp: Annotated[int, typer.Option(min=1, help="Ranks that share each sequence.")] = 1,
    tp: Annotated[int, typer.Option(min=1, help="Ranks that share each block.")] = 1,
    data: Annotated[Path | None, typer.Option(help="Text file or folder.")] = None,
    checkpoint: Annotated[Path, typer.Option(help="Folder.")] = Path("runs/distributed"),
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the checkpoint.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="In all, those before a resumption too.")] = 50,
    batch: Annotated[int, typer.Option(min=1)] = 4,
    length: Annotated[int, typer.Option(min=1)] = 512,
    d_model: Annotated[int, typer.Option(min=1)] = 64,
    layers: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Train a byte-level Mamba language model on a mesh of processes that torchrun started."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    if dp * cp * tp != dist.get_world_size():
        sys.exit(f"dp * cp * tp must be {dist.get_world_size()} processes; got {dp} * {cp} * {tp}")
    if batch % dp or length % cp:
        sys.exit(f"--batch must be a multiple of dp={dp}, --length of cp={cp}")
    device = "cuda" if cuda else "cpu"
    mesh = init_device_mesh(device, (dp, cp, tp), mesh_dim_names=("dp", "cp", "tp"))
    with torch.device(device):
        model = make_model(mesh, d_model, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, foreach=False)
    text, _ = read_text(data)
    context_parallel = ContextParallel(mesh["cp"])
    first = load(checkpoint, model, optimizer) if resume else 0
    for step in range(first, steps):
        tokens, targets = (t.to(device) for t in batch_of(text, step, batch, length, mesh))
        logits = model(tokens, context_parallel)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()  # the mean over all tokens: FSDP takes that over the ranks
        optimizer.step()
        shown = loss.detach()
        dist.all_reduce(shown)
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {shown.item() / dist.get_world_size():.4f}", flush=True)
    save(checkpoint, model, optimizer, steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
