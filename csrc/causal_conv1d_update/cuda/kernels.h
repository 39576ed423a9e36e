// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "causal_conv1d_update/params.h"

namespace mambablock {

void cuda_update(const char* op, const CausalConv1dUpdateParams& p, cudaStream_t stream);

}  // namespace mambablock
