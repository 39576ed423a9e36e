# SPDX-License-Identifier: Apache-2.0
"""peft's LoRA on the block's four projections."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from mambablock import MambaBlock

peft = pytest.importorskip("peft")

LAYERS = ["in_proj", "x_proj", "dt_proj", "out_proj"]
# float32 sums of some dozen terms in another order.
assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def adapt(model: nn.Module, layers: list[str], **options: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=layers, **options))


def make_model(recompute: bool = False) -> nn.Module:
    """Two blocks in which delta is not so small that only D matters, as it is at the start."""
    torch.manual_seed(0)
    model = nn.Sequential(*(MambaBlock(16, d_state=5, recompute=recompute) for _ in range(2)))
    with torch.no_grad():
        for block in model:
            block.dt_proj.bias.add_(3)
            for layer in (block.in_proj, block.x_proj, block.out_proj):
                layer.weight.mul_(2)
    return model


@pytest.mark.parametrize("layer", LAYERS)
def test_each_adapter_matters(layer: str) -> None:
    hidden = torch.randn(2, 9, 16)
    before = make_model()(hidden)
    adapted = adapt(make_model(), [layer], init_lora_weights=False)
    after = adapted(hidden)
    assert (after - before).abs().max() > 1e-2 * before.abs().max()
    assert_close(adapted.merge_and_unload()(hidden), after)


@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_train(recompute: bool) -> None:
    adapted = adapt(make_model(recompute), LAYERS)
    names = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(names) == 2 * len(LAYERS) * 2
    before = copy.deepcopy(adapted.state_dict())
    hidden, target = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (adapted(hidden) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, t in adapted.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == names


def test_step_uses_the_adapters() -> None:
    adapted = adapt(make_model(), LAYERS, init_lora_weights=False)
    block = adapted.base_model.model[0]
    hidden = torch.randn(2, 3, 16)
    state = block.allocate_state(2)
    steps = torch.stack([block.step(hidden[:, t], state) for t in range(3)], dim=1)
    assert_close(steps, block(hidden))
