# SPDX-License-Identifier: Apache-2.0
"""Package a random MambaBlock for main.cpp, and print what main.cpp prints from it.

python examples/cpp/export.py FOLDER writes FOLDER/prefill.pt2 and FOLDER/decode.pt2 and prints
the path of the operators' library, main.cpp's second argument, to standard error.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import mambablock
from mambablock import MambaBlock, MambaState

D_MODEL, BATCH, PROMPT, STEPS = 16, 2, 70, 5


class Prefill(nn.Module):
    def __init__(self, block: MambaBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (batch, length, d_model) and a state to y and the state after it."""
        y, state = self.block(x, MambaState(conv, ssm), return_state=True)
        return y, state.conv, state.ssm


class Decode(nn.Module):
    def __init__(self, block: MambaBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, conv: Tensor, ssm: Tensor) -> Tensor:
        """x (batch, d_model) to y; the state advances in place."""
        return self.block.step(x, MambaState(conv, ssm))


def package(module: nn.Module, x: Tensor, state: MambaState, path: Path) -> None:
    """Compile for any batch and length, ahead of time."""
    batch = {0: torch.export.Dim("batch", max=1024)}
    length = {1: torch.export.Dim("length", max=1 << 20)} if x.dim() == 3 else {}
    program = torch.export.export(
        module, (x, *state), dynamic_shapes=(batch | length, batch, batch)
    )
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


@torch.no_grad()
def main(folder: Path) -> None:
    torch.manual_seed(0)
    block = MambaBlock(D_MODEL)
    state = block.allocate_state(BATCH)
    count = BATCH * (PROMPT + STEPS) * D_MODEL
    x = torch.arange(count).sin().view(BATCH, PROMPT + STEPS, D_MODEL)
    package(Prefill(block), x[:, :PROMPT].contiguous(), state, folder / "prefill.pt2")
    package(Decode(block), x[:, 0].contiguous(), state, folder / "decode.pt2")

    y, state = block(x[:, :PROMPT], state, return_state=True)
    outputs = [y[:, -1], *(block.step(x[:, t], state) for t in range(PROMPT, PROMPT + STEPS))]
    for y in outputs:
        print(" ".join(f"{value:.6f}" for value in y.flatten().tolist()))
    print(Path(mambablock.__file__).parent / "libmambablock.so", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print(f"FOLDER must be one folder that exists; got {sys.argv[1:]}.", file=sys.stderr)
        sys.exit(2)
    main(Path(sys.argv[1]))
