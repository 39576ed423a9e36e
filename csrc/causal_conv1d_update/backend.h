// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "causal_conv1d_update/params.h"
#include "common/host/checks.h"

namespace mambablock {

// A device's part, in cpu.cpp and cuda.cpp: the rows of the state that are used, and the kernel.
void run_update(const Checks& checks, const CausalConv1dUpdateParams& p,
                const OptionalTensor& state_indices);

}  // namespace mambablock
