// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "selective_state_update/params.h"

namespace mambablock {

// state_rows (B) has each row's row of the state, a negative one or one past the end for padding;
// where it is null, each has its own.
void cuda_update(const char* op, const SelectiveStateUpdateParams& p, const int64_t* state_rows,
                 cudaStream_t stream);

}  // namespace mambablock
