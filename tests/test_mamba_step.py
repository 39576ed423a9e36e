# SPDX-License-Identifier: Apache-2.0
"""mamba_step: the decoding step of a whole block as one operator, and who uses it."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from blocks import Adapted
from compare import assert_same_bits
from mambablock import MambaBlock, MambaState, mamba_step, reference
from operators import DTYPES, LOW_PRECISION, Calls, subsets

OP = torch.ops.mambablock.mamba_step.default
OPTIONAL = ("in_proj_bias", "conv_bias", "dt_proj_bias", "out_proj_bias", "norm_eps")
LINEARS = ("in_proj_weight", "x_proj_weight", "dt_proj_weight", "out_proj_weight")


def make_inputs(
    batch: int = 3,
    d_model: int = 6,
    d_inner: int = 20,
    d_state: int = 5,
    d_conv: int = 4,
    dt_rank: int = 3,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.float64,
    state_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """All arguments, in the schema's order."""
    wide = torch.promote_types(dtype, torch.float32)

    def draw(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    rows = batch if rows is None else rows
    return {
        "conv_state": draw(state_dtype or wide, rows, d_conv - 1, d_inner),
        "ssm_state": draw(state_dtype or wide, rows, d_inner, d_state),
        "x": draw(dtype, batch, d_model),
        "in_proj_weight": draw(dtype, 2 * d_inner, d_model),
        "in_proj_bias": draw(dtype, 2 * d_inner),
        "conv_weight": draw(dtype, d_inner, d_conv),
        "conv_bias": draw(dtype, d_inner),
        "x_proj_weight": draw(dtype, dt_rank + 2 * d_state, d_inner) / d_inner,
        "dt_proj_weight": draw(dtype, d_inner, dt_rank),
        "dt_proj_bias": draw(dtype, d_inner),
        "A_log": draw(wide, d_inner, d_state),
        "D": draw(wide, d_inner),
        "out_proj_weight": draw(dtype, d_model, d_inner),
        "out_proj_bias": draw(dtype, d_model),
        "dt_norm_weight": draw(dtype, dt_rank),
        "B_norm_weight": draw(dtype, d_state),
        "C_norm_weight": draw(dtype, d_state),
        "norm_eps": 1e-5,
        "state_indices": None,
    }


def run(function: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """y and the states that it leaves."""
    states = {name: arguments[name].clone() for name in ("conv_state", "ssm_state")}
    return {"y": function(**(arguments | states)), **states}


def assert_matches_reference(arguments: dict[str, Any]) -> None:
    got, expected = run(mamba_step, arguments), run(reference.mamba_step, arguments)
    accumulator = torch.promote_types(arguments["x"].dtype, torch.float32)
    for name, value in expected.items():
        # A few sums of some dozen terms in another order, one after another; a lower type may
        # round to the neighbour.
        tolerance = 200 * torch.finfo(accumulator).eps + 2 * torch.finfo(value.dtype).eps
        scale = float(value.abs().max()) if value.numel() else 0
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_types(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    assert_matches_reference(make_inputs(dtype=dtype, state_dtype=state_dtype))


@pytest.mark.parametrize("absent", list(subsets(OPTIONAL)), ids=str)
def test_optional_arguments(absent: tuple[str, ...]) -> None:
    assert_matches_reference(make_inputs() | dict.fromkeys(absent))


def test_norms_without_weights() -> None:
    weights = ("dt_norm_weight", "B_norm_weight", "C_norm_weight")
    assert_matches_reference(make_inputs() | dict.fromkeys(weights))


@pytest.mark.parametrize("batch", [0, 1, 2, 5, 16])
@pytest.mark.parametrize("d_inner", [1, 7, 16, 100])
@pytest.mark.parametrize("d_state", [1, 16, 33])
@pytest.mark.parametrize("d_conv", [1, 2, 4, 9])
def test_sizes(batch: int, d_inner: int, d_state: int, d_conv: int) -> None:
    assert_matches_reference(make_inputs(batch, 5, d_inner, d_state, d_conv))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_state_indices(dtype: torch.dtype, integer: torch.dtype) -> None:
    arguments = make_inputs(rows=5, dtype=dtype)
    arguments["state_indices"] = torch.tensor([4, -1, 0], dtype=integer)
    assert_matches_reference(arguments)


def test_padding_of_nan_leaves_the_states() -> None:
    arguments = make_inputs()
    arguments["x"][1] = torch.nan
    arguments["state_indices"] = torch.tensor([2, -1, 0])
    got = run(mamba_step, arguments)
    assert all(value.isfinite().all() for value in got.values())
    assert_same_bits(got["y"][1], torch.zeros(6, dtype=torch.float64))
    for name in ("conv_state", "ssm_state"):
        assert_same_bits(got[name][1], arguments[name][1])


@pytest.mark.parametrize("name", ["conv_state", "ssm_state", "x", *LINEARS, "A_log"])
def test_any_strides(name: str) -> None:
    arguments = make_inputs()
    expected = run(mamba_step, arguments)
    value = arguments[name]
    spread = torch.zeros(*value.shape[:-1], 2 * value.shape[-1], dtype=value.dtype)[..., ::2]
    states = {n: arguments[n].clone() for n in ("conv_state", "ssm_state")}
    given = arguments | states
    given[name] = spread.copy_(value)
    assert_same_bits(mamba_step(**given), expected["y"])
    for state in ("conv_state", "ssm_state"):
        assert_same_bits(given[state], expected[state])


def test_same_bits_for_any_number_of_rows_and_threads() -> None:
    arguments = make_inputs(5, 64, 200, dtype=torch.float32)
    expected = run(mamba_step, arguments)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for name, value in run(mamba_step, arguments).items():
                assert_same_bits(value, expected[name])
    finally:
        torch.set_num_threads(threads)
    one = {n: arguments[n][3:4] for n in ("conv_state", "ssm_state", "x")}
    for name, value in run(mamba_step, arguments | one).items():
        assert_same_bits(value[0], expected[name][3])


def test_argument_names_agree() -> None:
    names = [argument.name for argument in OP._schema.arguments]
    for function in (mamba_step, reference.mamba_step):
        assert list(inspect.signature(function).parameters) == names
    assert list(make_inputs()) == names


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absent", [(), OPTIONAL])
def test_opcheck(dtype: torch.dtype, absent: tuple[str, ...]) -> None:
    opcheck(OP, (), make_inputs(dtype=dtype) | dict.fromkeys(absent))


BAD_CALLS: list[tuple[str, Any, str]] = [
    ("x", lambda t: t[0], "(batch, d_model); got (6,)"),
    ("x", lambda t: t.int(), "float32, bfloat16, float16 or float64; got Int"),
    ("in_proj_weight", lambda t: t[1:], "(2 * d_inner=40, d_model=6); got (39, 6)"),
    ("in_proj_weight", lambda t: t.float(), "float64 as x; got float32"),
    ("in_proj_bias", lambda t: t[:20], "(2 * d_inner=40); got (20,)"),
    ("conv_weight", lambda t: t[:, None], "(d_inner, d_conv); got (20, 1, 4)"),
    ("conv_bias", lambda t: t[1:], "(d_inner=20); got (19,)"),
    ("x_proj_weight", lambda t: t[1:], "(dt_rank + 2 * d_state=13, d_inner=20); got (12, 20)"),
    ("dt_proj_weight", lambda t: t[:, 0], "(d_inner, dt_rank); got (20,)"),
    ("dt_proj_bias", lambda t: t.half(), "float64 or float32; got float16"),
    ("A_log", lambda t: t[0], "(d_inner, d_state); got (5,)"),
    ("D", lambda t: t[1:], "(d_inner=20); got (19,)"),
    ("out_proj_weight", lambda t: t.mT, "(d_model=6, d_inner=20); got (20, 6)"),
    ("out_proj_bias", lambda t: t[1:], "(d_model=6); got (5,)"),
    ("dt_norm_weight", lambda t: t[1:], "(dt_rank=3); got (2,)"),
    ("B_norm_weight", lambda t: t[1:], "(d_state=5); got (4,)"),
    ("C_norm_weight", lambda t: t[1:], "(d_state=5); got (4,)"),
    ("conv_state", lambda t: t.mT, "(rows=3, d_conv - 1=3, d_inner=20); got (3, 20, 3)"),
    ("conv_state", lambda t: t[:2], "of batch=3 rows; got 2"),
    ("ssm_state", lambda t: t.int(), "float32, bfloat16, float16 or float64; got Int"),
    ("ssm_state", lambda t: t[..., 1:], "(rows=3, d_inner=20, d_state=5); got (3, 20, 4)"),
    ("state_indices", lambda _: torch.tensor([0, 1]), "(batch=3); got (2,)"),
    ("state_indices", lambda _: torch.tensor([0, 1, 3]), ""),
]


@pytest.mark.parametrize(
    ("name", "change", "message"), BAD_CALLS, ids=lambda v: None if callable(v) else str(v)[:40]
)
def test_bad_calls(name: str, change: Any, message: str) -> None:
    arguments = make_inputs()
    before = {n: arguments[n].clone() for n in ("conv_state", "ssm_state")}
    with pytest.raises(RuntimeError, match=re.escape(f"mamba_step: {name} must be {message}")):
        mamba_step(**(arguments | {name: change(arguments[name])}))
    for state, value in before.items():
        assert_same_bits(arguments[state], value)


def test_states_of_different_numbers_of_rows() -> None:
    arguments = make_inputs(rows=5) | {"state_indices": torch.tensor([0, 1, 2])}
    message = "mamba_step: ssm_state must be of as many rows as conv_state=5; got 4"
    with pytest.raises(RuntimeError, match=message):
        mamba_step(**(arguments | {"ssm_state": arguments["ssm_state"][:4]}))


TENSORS = [
    (a.name, str(a.type) == "Tensor") for a in OP._schema.arguments if "Tensor" in str(a.type)
]


@pytest.mark.parametrize(("name", "required"), TENSORS)
def test_argument_that_is_no_tensor_or_on_another_device(name: str, required: bool) -> None:
    arguments = make_inputs() | {"state_indices": torch.tensor([2, 1, 0])}
    expected = "a Tensor" if required else "a Tensor or None"
    with pytest.raises(TypeError, match=f"^mamba_step: {name} must be {expected}; got list$"):
        mamba_step(**(arguments | {name: [1.0]}))
    expected = r"\w+ must be on meta as x; got cpu"
    if name != "x":
        expected = f"{name} must be on cpu as x; got meta"
    with pytest.raises(RuntimeError, match=f"mamba_step: {expected}"):
        mamba_step(**(arguments | {name: arguments[name].to("meta")}))


# MambaBlock


def steps(block: MambaBlock, x: Tensor) -> tuple[bool, Tensor, MambaState]:
    """Whether the operator runs, y and the state after one step of a state of zeros."""
    state = block.allocate_state(x.shape[0])
    with Calls() as calls:
        y = block.step(x, state)
    return len(calls.of("mambablock::mamba_step")) == 1, y, state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"bias": True, "conv_bias": False, "d_conv": 1}])
def test_block_steps_as_forward_goes(dtype: torch.dtype, options: dict[str, Any]) -> None:
    block = MambaBlock(24, **options, dtype=dtype)
    x = torch.randn(3, 6, 24).to(dtype)
    with torch.no_grad():
        expected, last = block(x, return_state=True)
    state = block.allocate_state(3)
    for t in range(6):
        y = block.step(x[:, t], state)
    # Of the activations' type, forward rounds each layer's output to it.
    tolerance = 8 * torch.finfo(dtype).eps if dtype in LOW_PRECISION else 1e-13
    for got, value in zip((y, *state), (expected[:, -1], *last), strict=True):
        scale = float(value.abs().max()) if value.numel() else 0
        torch.testing.assert_close(got, value, rtol=tolerance, atol=tolerance * scale)


def test_a_changed_weight_counts_at_the_next_step() -> None:
    block, x = MambaBlock(24), torch.randn(2, 24)
    _, before, _ = steps(block, x)
    for name, parameter in block.named_parameters():
        if name in ("A_log", "conv1d.weight"):
            continue  # which a state of zeros hides, in part
        with torch.no_grad():
            parameter.mul_(1.5)
        _, after, _ = steps(block, x)
        assert not torch.equal(before, after), name
        before = after


def test_block_uses_it_where_its_linear_layers_are_plain() -> None:
    x = torch.randn(2, 24)
    assert steps(MambaBlock(24), x)[0]
    assert not steps(MambaBlock(24), torch.randn(17, 24))[0]
    hooked = MambaBlock(24)
    hooked.x_proj.register_forward_hook(lambda *_: None)
    assert not steps(hooked, x)[0]
    adapted = MambaBlock(24)
    adapted.out_proj = Adapted(adapted.out_proj)
    assert not steps(adapted, x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert steps(MambaBlock(24), x)[1].dtype == torch.bfloat16


def test_general_path_gives_the_same() -> None:
    block, x = MambaBlock(24, dtype=torch.float64), torch.randn(2, 24, dtype=torch.float64)
    used, y, state = steps(block, x)
    block.in_proj.register_forward_hook(lambda *_: None)
    unused, expected, expected_state = steps(block, x)
    assert used
    assert not unused
    torch.testing.assert_close((y, *state), (expected, *expected_state), rtol=1e-12, atol=1e-14)


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = MambaBlock(24)

    def forward(self, x: Tensor, conv: Tensor, ssm: Tensor) -> Tensor:
        return self.block.step(x, MambaState(conv, ssm))


def test_compiled_and_exported_steps_use_it() -> None:
    module, x = Step().eval(), torch.randn(2, 24)
    _, y, state = steps(module.block, x)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    program = torch.export.export(module, (x, *module.block.allocate_state(2)))
    graphs.append(str(program.graph))
    for call in (compiled, program.module()):
        conv, ssm = module.block.allocate_state(2)
        assert_same_bits(call(x, conv, ssm), y)
        assert_same_bits((conv, ssm), tuple(state))
    assert len(graphs) == 2
    assert all("mamba_step" in graph for graph in graphs)
