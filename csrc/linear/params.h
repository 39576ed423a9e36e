// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace mambablock {

// y = x weight^T + bias, for few rows of x. The accumulator's type is float, or double for float64.
struct LinearParams {
  DType dtype;    // of the weight
  DType y_dtype;  // the weight's, or the accumulator's
  int64_t rows, in_features, out_features;

  const void* x;  // accumulators, of contiguous rows
  int64_t x_row;
  const void* weight;  // (out_features, in_features), of contiguous rows
  int64_t weight_row;
  const void* bias;  // (out_features) accumulators; may be null
  void* y;           // (rows, out_features), of contiguous rows
  int64_t y_row;
};

}  // namespace mambablock
