// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/views.h"

namespace mambablock {

// One time step of the selective scan, so the views' time strides are unused.
struct SelectiveStateUpdateParams {
  DType dtype, state_dtype;
  int64_t batch, channels, d_state, groups;
  int64_t rows;  // of the state
  bool delta_softplus;

  void* state;  // (rows, D, N), strides in elements
  int64_t state_row, state_channel, state_stride;

  InputView u, delta, z;     // (B, D)
  GroupedView B, C;          // (B, G, N)
  ParameterView A;           // (D, N)
  ParameterView D;           // (D)
  ParameterView delta_bias;  // (D)
  OutputView y;              // (B, D)
};

}  // namespace mambablock
