// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "selective_state_update/params.h"

namespace mambablock {

void cuda_update(const char* op, const SelectiveStateUpdateParams& p, cudaStream_t stream);

}  // namespace mambablock
