// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cpu/simd_level.h"
#include "selective_state_update/params.h"

namespace mambablock {

// Processes the (batch, channel) pairs [begin, end). state_rows (B) has each one's row of the
// state, a negative one for padding.
MAMBABLOCK_DECLARE_KERNEL(void, selective_state_update,
                          (const SelectiveStateUpdateParams&, const int64_t* state_rows,
                           int64_t begin, int64_t end));

}  // namespace mambablock
