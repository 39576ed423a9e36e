// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "common/dtype.h"

namespace mambablock {

// total[i] = the sum over `count` rows of partials[row * size + i], in the rows' order; partials
// are in the accumulator's type of `dtype`, total in `dtype`.
void sum_rows(const char* op, DType dtype, const void* partials, int64_t count, int64_t size,
              void* total, cudaStream_t stream);

}  // namespace mambablock
