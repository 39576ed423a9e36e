# SPDX-License-Identifier: Apache-2.0
"""MambaBlock with other layers, under PyTorch's transformations, next to transformers' mixer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from blocks import (
    Adapted,
    assert_same,
    make_block,
    ragged_mask,
    random_state,
    trained,
)
from compare import gradients
from mambablock import MambaBlock

pytestmark = pytest.mark.usefixtures("device")


# Layers that are not plain nn.Linear


@pytest.mark.parametrize("layer", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_adapted_layers_are_called(layer: str) -> None:
    block = make_block()
    adapted = copy.deepcopy(block)
    wrapped = Adapted(getattr(adapted, layer))
    setattr(adapted, layer, wrapped)
    with torch.no_grad():
        getattr(block, layer).weight.add_(wrapped.up.weight @ wrapped.down.weight)
    hidden = torch.randn(2, 7, 6, dtype=torch.float64)
    y = adapted(hidden)
    assert_same(y, block(hidden))
    assert all(g.any() for g in gradients([y], list(wrapped.parameters())))
    assert_same(adapted.step(hidden[:, 0], adapted.allocate_state(2)), y[:, 0])


@pytest.mark.parametrize("layer", ["in_proj", "x_proj", "dt_proj", "out_proj"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_run(layer: str, kind: str) -> None:
    block = make_block()
    hidden = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    expected = block(hidden)
    calls = []
    register = getattr(getattr(block, layer), f"register_{kind}_hook")
    register(lambda *arguments: calls.append(kind))
    y = block(hidden)
    y.sum().backward()
    assert calls == [kind]
    assert_same(y, expected)


def test_replaced_forward_runs() -> None:
    """Some libraries swap a layer's forward on the instance, for offloading for example."""
    block = make_block()
    block.dt_proj.forward = lambda dt: torch.full((*dt.shape[:-1], 12), -1e9, dtype=dt.dtype)
    with torch.no_grad():
        block.D.zero_()
    assert not block(torch.randn(2, 7, 6, dtype=torch.float64)).any()


def test_dt_proj_without_bias() -> None:
    block = make_block()
    hidden = torch.randn(2, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        block.dt_proj.bias.zero_()
    expected = block(hidden)
    block.dt_proj.bias = None
    assert_same(block(hidden), expected)


@pytest.mark.parametrize("frozen", ["x_proj.weight", "all others", "nothing"])
def test_frozen_layers_and_a_second_backward(frozen: str) -> None:
    """x_proj adds its gradient to the scan's in place: nothing else may see that."""
    block, hidden = make_block(), torch.randn(2, 7, 6, dtype=torch.float64)
    named = dict(block.named_parameters())
    hook = block.x_proj.register_forward_hook(lambda *_: None)  # so that it does not
    expected = dict(zip(named, gradients([block(hidden)], [*named.values()]), strict=True))
    hook.remove()
    for name, parameter in named.items():
        parameter.requires_grad_((name == "x_proj.weight") == (frozen == "all others"))
        if frozen == "nothing":
            parameter.requires_grad_()
    leaves = {name: p for name, p in named.items() if p.requires_grad}
    y = block(hidden)
    weights = torch.randn_like(y)
    first, second = (
        torch.autograd.grad(y, [*leaves.values()], weights, retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    got = gradients([y], [*leaves.values()])
    assert_same(got, tuple(expected[name] for name in leaves))


# PyTorch around the block


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_copies(copy_of: Callable[[MambaBlock], MambaBlock]) -> None:
    block = make_block()
    block.name = "encoder"
    other = copy_of(block)
    hidden = torch.randn(2, 7, 6, dtype=torch.float64)
    assert torch.equal(other(hidden), block(hidden))
    assert other.name == "encoder"
    assert other.A_log._no_weight_decay
    assert other.D._no_weight_decay
    with torch.no_grad():
        other.D.zero_()
    assert block.D.any()


def test_functional_call_and_grad() -> None:
    block = make_block()
    hidden = torch.randn(2, 7, 6, dtype=torch.float64)
    parameters = dict(block.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(block, parameters, (hidden,)).square().sum()

    actual = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    assert_same(list(actual.values()), list(expected))


@pytest.mark.parametrize("adapted", [False, True])
def test_compile(adapted: bool) -> None:
    block = make_block(bias=True)
    if adapted:
        block.dt_proj = Adapted(block.dt_proj)
    torch.compiler.reset()
    # One case goes through the default code generator, which is slow to compile.
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager" if adapted else "inductor")
    hidden = torch.randn(5, 7, 6, dtype=torch.float64, requires_grad=True)
    state = random_state(block, 5)
    inputs = trained(block, hidden, *state)
    mask = ragged_mask()
    y, last = compiled(hidden, state, attention_mask=mask, return_state=True)
    expected_y, expected_last = block(hidden, state, attention_mask=mask, return_state=True)
    actual, expected = [y, *last], [expected_y, *expected_last]
    assert_same(actual, expected)
    assert_same(gradients(actual, inputs), gradients(expected, inputs))


def test_compile_packed() -> None:
    block = make_block()
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    hidden = torch.randn(1, 9, 6, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 3, 3, 9])
    y = compiled(hidden, cu_seqlens=cu_seqlens)
    expected = block(hidden, cu_seqlens=cu_seqlens)
    assert_same(y, expected)
    inputs = trained(block, hidden)
    assert_same(gradients([y], inputs), gradients([expected], inputs))


def test_compile_step() -> None:
    block = make_block()
    torch.compiler.reset()
    compiled = torch.compile(block.step, fullgraph=True, backend="aot_eager")
    hidden = torch.randn(2, 3, 6, dtype=torch.float64)
    state, expected_state = block.allocate_state(2), block.allocate_state(2)
    for t in range(3):
        expected = block.step(hidden[:, t], expected_state)
        assert_same(compiled(hidden[:, t], state), expected)
    assert_same(list(state), list(expected_state))


def test_compile_under_autocast(device: torch.device) -> None:
    """Where the input's type is not the parameters'."""
    block = make_block(dtype=torch.bfloat16)
    hidden = torch.randn(2, 6)

    def step() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return block.step(hidden, block.allocate_state(hidden.shape[0]))

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), step())


class FromZeros(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = make_block()

    def forward(self, hidden: Tensor) -> Tensor:
        state = self.block.allocate_state(hidden.shape[0])
        y, state = self.block(hidden, state, return_state=True)
        return y[:, -1] + self.block.step(hidden[:, 0], state)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_allocate_state(strict: bool) -> None:
    module = FromZeros()
    shapes = ({0: torch.export.Dim("batch", max=1024)},)
    example = (torch.randn(2, 7, 6, dtype=torch.float64),)
    program = torch.export.export(module, example, dynamic_shapes=shapes, strict=strict)
    hidden = torch.randn(5, 7, 6, dtype=torch.float64)
    assert_same(program.module()(hidden), module(hidden))


def test_export() -> None:
    block = make_block()
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=4096)}
    program = torch.export.export(
        block,
        (torch.randn(2, 7, 6, dtype=torch.float64),),
        {"attention_mask": torch.ones(2, 7, dtype=torch.bool)},
        dynamic_shapes={"hidden_states": shape, "attention_mask": shape},
    )
    mask = ragged_mask()[:, 1:] == 1
    hidden = torch.randn(*mask.shape, 6, dtype=torch.float64)
    assert_same(program.module()(hidden, attention_mask=mask), block(hidden, attention_mask=mask))


# Other implementations


@pytest.mark.parametrize("bias", [False, True])
def test_transformers_mixer(bias: bool) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    config = transformers.MambaConfig(
        hidden_size=16,
        state_size=6,
        conv_kernel=4,
        time_step_rank=3,
        num_hidden_layers=1,
        use_bias=bias,
        use_conv_bias=bias,
    )
    mixer = MambaMixer(config, layer_idx=0)
    block = MambaBlock(16, d_state=6, dt_rank=3, bias=bias, conv_bias=bias)
    block.load_state_dict(mixer.state_dict(), strict=True)
    mixer.load_state_dict(block.state_dict(), strict=True)

    hidden = torch.randn(2, 21, 16, requires_grad=True)
    expected, actual = mixer(hidden), block(hidden)
    # float32 sums over 21 steps, 6 states and 32 channels in another order.
    assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    assert_close(actual, expected)
    named = dict(mixer.named_parameters())
    theirs = gradients([expected], [*(named[n] for n, _ in block.named_parameters()), hidden])
    assert_close(gradients([actual], trained(block, hidden)), theirs)
