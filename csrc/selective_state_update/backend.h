// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/host/checks.h"
#include "selective_state_update/params.h"

namespace mambablock {

// A device's part, in cpu.cpp and cuda.cpp: the rows of the state that are used, and the kernel.
void run_update(const Checks& checks, const SelectiveStateUpdateParams& p,
                const OptionalTensor& state_indices);

}  // namespace mambablock
