# SPDX-License-Identifier: Apache-2.0
import numpy as np
from numpy.typing import NDArray

def math(name: str, x: NDArray[np.float32], level: str | None = None) -> NDArray[np.float32]: ...
