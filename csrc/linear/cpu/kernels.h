// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cpu/simd_level.h"
#include "linear/params.h"

namespace mambablock {

// The out_features [begin, end): rows of the weight, which are read from memory once. The same bits
// at every SIMD level, and for any number of rows and threads.
MAMBABLOCK_DECLARE_KERNEL(void, linear, (const LinearParams&, int64_t begin, int64_t end));

}  // namespace mambablock
