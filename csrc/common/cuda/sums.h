// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "common/dtype.h"

namespace mambablock {

// total[i] = the sum over `count` rows of partials[row * size + i], in the rows' order. Partials
// are float32 or float64, and a total of float64 has partials of float64.
void sum_rows(const char* op, DType partials_dtype, DType total_dtype, const void* partials,
              int64_t count, int64_t size, void* total, cudaStream_t stream);

}  // namespace mambablock
