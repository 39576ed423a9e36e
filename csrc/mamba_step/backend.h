// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/host/checks.h"
#include "mamba_step/params.h"

namespace mambablock {

// The CPU's part, in cpu.cpp.
void run_step(const Checks& checks, const MambaStepParams& p, const OptionalTensor& state_indices);

}  // namespace mambablock
