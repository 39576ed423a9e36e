# SPDX-License-Identifier: Apache-2.0
"""Whether there is a CUDA device to check and measure on.

As a program, it prints the device's architecture, as TORCH_CUDA_ARCH_LIST has it; its arguments are
packages that must be there.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec


class NotReadyError(Exception):
    """What is missing, in one sentence."""


def require_packages(*names: str) -> None:
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise NotReadyError(f"expected packages that {sys.executable} lacks: {', '.join(missing)}")


def require_device() -> str:
    """The architecture of PyTorch's current CUDA device."""
    require_packages("torch")
    import torch

    if torch.version.cuda is None:
        raise NotReadyError(f"expected a torch with CUDA; got torch {torch.__version__}")
    if not torch.cuda.is_available():
        raise NotReadyError("expected a CUDA device; torch finds none")
    return "{}.{}".format(*torch.cuda.get_device_capability())


if __name__ == "__main__":
    try:
        require_packages(*sys.argv[1:])
        print(require_device())
    except NotReadyError as error:
        print(f"{error}.", file=sys.stderr)
        raise SystemExit(2) from None
