// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/views.h"

namespace mambablock {

// One time step of the convolution, so the views' time strides are unused.
struct CausalConv1dUpdateParams {
  DType dtype, state_dtype;
  int64_t batch, channels, width;
  int64_t rows;  // of the state
  bool silu;

  void* state;  // (rows, W-1, D), strides in elements
  int64_t state_row, state_step, state_channel;

  InputView x;           // (B, D)
  ParameterView weight;  // (D, W)
  ParameterView bias;    // (D)
  OutputView y;          // (B, D)
};

}  // namespace mambablock
