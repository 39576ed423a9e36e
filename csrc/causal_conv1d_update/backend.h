// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/host/checks.h"
#include "causal_conv1d_update/params.h"

namespace mambablock {

using OptionalTensor = std::optional<Tensor>;

// A device's part, in cpu.cpp and cuda.cpp: the rows of the state that are used, then the kernel.
void run_update(CausalConv1dUpdateParams params, const Checks& checks,
                const OptionalTensor& state_indices);

}  // namespace mambablock
