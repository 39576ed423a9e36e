// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/cpu/simd_level.h"
#include "common/views.h"

namespace mambablock {

// One time step of the convolution, so the input's time stride is unused. Parameters are float, or
// double for float64 activations; an absent argument is a null pointer.
struct CausalConv1dUpdateParams {
  DType dtype, state_dtype;
  int64_t batch, channels, width;
  bool silu;

  void* state;  // (rows, W-1, D), strides in elements
  int64_t state_row, state_step, state_channel;
  const int64_t* state_rows;  // (B), negative is padding; on CUDA null where each row has its own
  int64_t rows;               // of the state

  Strided3 x;
  const void* taps;  // (D, W) contiguous
  const void* bias;  // (D)
  Strided3Out y;
};

// Runs rows of (batch, channel) [begin, end).
MAMBABLOCK_DECLARE_KERNEL(void, causal_conv1d_update,
                          (const CausalConv1dUpdateParams&, int64_t begin, int64_t end));

}  // namespace mambablock
