# SPDX-License-Identifier: Apache-2.0
"""A block whose channels lie over gloo processes, against the whole block in one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from blocks import make_block
from mambablock import MambaBlock
from mambablock.distributed import ContextParallel, TensorParallel
from mambablock.integrations.transformers import patch
from processes import run_on_ranks

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch's gloo")

# Sums of some hundred float64 terms in another order.
assert_same = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
FULL = StateDictOptions(full_state_dict=True)


def results(block: MambaBlock, x: Tensor, **options: Any) -> tuple[list[Tensor], Any]:
    x = x.clone().requires_grad_()
    y, state = block(x, return_state=True, **options)
    y.square().sum().backward()
    return [y.detach(), x.grad], state


def same_on_all_ranks(tensor: Tensor) -> bool:
    others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, tensor.contiguous())
    return all(torch.equal(others[0], other) for other in others)


def check_block(rank: int, folder: Path) -> None:
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    for options in ({"bias": True}, {"recompute": True, "conv_bias": False}):
        whole = make_block(d_inner=12, **options)
        block = parallelize_module(copy.deepcopy(whole), mesh, TensorParallel())
        x = torch.randn(2, 9, 6, dtype=torch.float64)
        expected, states = results(whole, x)
        got, local_states = results(block, x)
        assert_same(got, expected)
        assert all(same_on_all_ranks(t) for t in got)
        channels = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
        assert_same(local_states.conv, states.conv[:, :, channels])
        assert_same(local_states.ssm, states.ssm[:, channels])
        for (name, p), q in zip(block.named_parameters(), whole.parameters(), strict=True):
            assert_same(p.full_tensor(), q, msg=lambda m, n=name: f"{n}: {m}")
            assert_same(p.grad.full_tensor(), q.grad, msg=lambda m, n=name: f"{n}: {m}")
        assert block.A_log._no_weight_decay
        step = x[:, 0]
        local_states = [s.detach().clone() for s in local_states]
        assert_same(block.step(step, local_states), whole.step(step, [s.detach() for s in states]))
        check_checkpoint(block, whole)
        check_sharded_checkpoint(block, whole, folder)
    with pytest.raises(ValueError, match=r"TensorParallel: d_inner must be a multiple of .*got 13"):
        parallelize_module(make_block(d_inner=13), mesh, TensorParallel())
    with pytest.raises(TypeError, match=r"TensorParallel: module must be .*; got Linear without"):
        parallelize_module(nn.Linear(2, 2), mesh, TensorParallel())


def check_checkpoint(block: nn.Module, whole: nn.Module) -> None:
    saved = get_model_state_dict(block, options=FULL)
    for name, value in whole.state_dict().items():
        assert_same(saved[name], value)
    changed = {name: value + 1 for name, value in saved.items()}
    set_model_state_dict(block, dict(changed), options=FULL)
    for name, value in get_model_state_dict(block, options=FULL).items():
        assert_same(value, changed[name])
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    with pytest.raises(RuntimeError, match="without broadcast_from_rank0"):
        set_model_state_dict(block, dict(changed), options=broadcast)
    set_model_state_dict(block, whole.state_dict(), options=FULL)


def check_sharded_checkpoint(block: nn.Module, whole: nn.Module, folder: Path) -> None:
    """What torch.distributed.checkpoint saves of shards is whole, and it loads into shards."""
    dcp.save(get_model_state_dict(block), checkpoint_id=folder)
    saved = {name: torch.zeros_like(value) for name, value in whole.state_dict().items()}
    dcp.load(saved, checkpoint_id=folder, no_dist=True)
    for name, value in whole.state_dict().items():
        assert_same(saved[name], value, msg=lambda m, n=name: f"{n}: {m}")
    dist.barrier()
    changed = {name: value + 1 for name, value in saved.items()}
    dcp.save(changed, checkpoint_id=folder)
    shards = get_model_state_dict(block)
    dcp.load(shards, checkpoint_id=folder)
    set_model_state_dict(block, shards)
    for name, value in get_model_state_dict(block, options=FULL).items():
        assert_same(value, changed[name], msg=lambda m, n=name: f"{n}: {m}")
    set_model_state_dict(block, whole.state_dict(), options=FULL)


def check_mesh(rank: int, folder: Path) -> None:
    """ContextParallel over one dimension, with FSDP, and TensorParallel over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    options = [{"bias": True}, {"recompute": True}]
    whole = nn.ModuleList(make_block(d_inner=12, **option) for option in options)
    model = copy.deepcopy(whole)
    for block in model:
        parallelize_module(block, mesh["tp"], TensorParallel())
        placement = TensorParallel.shard_placement_fn
        fully_shard(block, mesh=mesh["cp"], shard_placement_fn=placement)
    cp = ContextParallel(mesh["cp"])
    x = torch.randn(2, 16, 6, dtype=torch.float64)
    y = y_shard = None
    for _ in range(2):
        y, y_shard = x, x.chunk(2, 1)[mesh["cp"].get_local_rank()]
        for whole_block, block in zip(whole, model, strict=True):
            y, y_shard = whole_block(y), block(y_shard, context_parallel=cp)
        # FSDP takes the mean over its ranks, of gradients that add up.
        y.square().sum().backward()
        (2 * y_shard.square().sum()).backward()
        assert_same(y_shard, y.chunk(2, 1)[mesh["cp"].get_local_rank()])
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert_same(p.grad.full_tensor(), q.grad)
        for parameters in (model.parameters(), whole.parameters()):
            optimizer = torch.optim.SGD(parameters, lr=1e-4)
            optimizer.step()
            optimizer.zero_grad()
    check_checkpoint(model, whole)
    check_sharded_checkpoint(model, whole, folder)
    other = parallelize_module(make_block(d_inner=12), mesh["tp"], TensorParallel())
    fully_shard(other, mesh=mesh["cp"])
    with pytest.raises(RuntimeError, match="must be divided by fully_shard"):
        set_model_state_dict(other, whole[1].state_dict(), options=FULL)


def check_transformers(rank: int) -> None:
    from transformers import JambaConfig, JambaForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    mamba = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=2, vocab_size=16))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_experts": 1, "num_experts_per_tok": 1, "attn_layer_offset": 1}
    jamba = JambaForCausalLM(JambaConfig(**sizes, **heads, **experts, attn_layer_period=2))
    for model, plan in (
        (mamba, {"backbone.layers.*.mixer": TensorParallel()}),
        (jamba, {"model.layers.0.mamba": TensorParallel()}),
    ):
        model = patch(model.double()).eval()
        distributed = parallelize_module(copy.deepcopy(model), mesh, plan)
        tokens = torch.randint(16, (2, 5))
        expected, got = model(tokens).logits, distributed(tokens).logits
        assert_same(got, expected)
        expected.square().sum().backward()
        got.square().sum().backward()
        for (name, p), q in zip(distributed.named_parameters(), model.parameters(), strict=True):
            gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            assert_same(gradient, q.grad, msg=lambda m, n=name: f"{n}: {m}")
        generated = distributed.generate(tokens, max_new_tokens=3, do_sample=False)
        assert torch.equal(generated, model.generate(tokens, max_new_tokens=3, do_sample=False))


def check_alone(rank: int, folder: Path) -> None:
    check_block(rank, folder)
    check_transformers(rank)


@pytest.mark.parametrize(("ranks", "body"), [(2, check_alone), (4, check_mesh)])
def test_tensor_parallel(ranks: int, body: Callable[[int, Path], None], tmp_path: Path) -> None:
    run_on_ranks(ranks, partial(body, folder=tmp_path / "checkpoint"), tmp_path)
