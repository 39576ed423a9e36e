// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "causal_conv1d_update/params.h"
#include "common/cpu/simd_level.h"

namespace mambablock {

// Processes the (batch, channel) pairs [begin, end). state_rows (B) has each one's row of the
// state, a negative one for padding.
MAMBABLOCK_DECLARE_KERNEL(void, causal_conv1d_update,
                          (const CausalConv1dUpdateParams&, const int64_t* state_rows,
                           int64_t begin, int64_t end));

}  // namespace mambablock
