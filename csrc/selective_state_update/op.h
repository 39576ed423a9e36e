// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../common/checks.h"
#include "params.h"

namespace mambablock {

using OptionalTensor = std::optional<Tensor>;

// A device's part, in cpu.cpp and cuda.cpp: the rows of the state that are used, then the kernel.
void run_update(SelectiveStateUpdateParams params, const Checks& checks,
                const OptionalTensor& state_indices);

}  // namespace mambablock
