// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/host/checks.h"
#include "selective_state_update/params.h"

namespace mambablock {

using OptionalTensor = std::optional<Tensor>;

// A device's part, in cpu.cpp and cuda.cpp: the rows of the state that are used, then the kernel.
void run_update(SelectiveStateUpdateParams params, const Checks& checks,
                const OptionalTensor& state_indices);

}  // namespace mambablock
