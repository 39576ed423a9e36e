// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "linear/params.h"

namespace mambablock {

// The CPU's part, in cpu.cpp.
void run_linear(const LinearParams& p);

}  // namespace mambablock
