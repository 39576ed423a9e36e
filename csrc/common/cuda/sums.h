// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "common/views.h"

namespace mambablock {

// total[i] = the sum over `count` rows of partials[row * size + i], by factor[i] if there is one.
struct RowSums {
  const void* partials;
  int64_t count, size;
  void* total;
  DType total_dtype;
  ParameterView factor;
};

// The most sums that one launch computes: those of all of an operator's gradients.
inline constexpr int kMostRowSums = 5;

// Computes `count` of them, of partials that are all float32, or all float64.
void sum_rows(const char* op, DType partials_dtype, const RowSums* sums, int count,
              cudaStream_t stream);

}  // namespace mambablock
