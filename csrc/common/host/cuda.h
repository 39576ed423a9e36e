// SPDX-License-Identifier: Apache-2.0
//
// What the operators' CUDA sides share.
#pragma once

#include "common/host/cuda_context.h"
#include "common/host/op_call.h"

namespace mambablock {

// The boundaries of the call's packed sequences for the kernels, on the device; absent without
// cu_seqlens. Their values are made safe there: none of them leads out of bounds.
OptionalTensor device_boundaries(const OpCall& call, int64_t length);

}  // namespace mambablock
