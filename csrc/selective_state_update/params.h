// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/cpu/simd_level.h"
#include "common/views.h"

namespace mambablock {

// One time step of the selective scan, so the inputs' time stride is unused. Parameters are float,
// or double for float64 activations; an absent argument is a null pointer.
struct SelectiveStateUpdateParams {
  DType dtype, state_dtype;
  int64_t batch, channels, d_state, groups;
  bool delta_softplus;

  void* state;  // (rows, D, N), strides in elements
  int64_t state_row, state_channel, state_stride;
  const int64_t* state_rows;  // (B), negative is padding; on CUDA null where each row has its own
  int64_t rows;               // of the state

  Strided3 u, delta, z;
  Strided4 B, C;
  const void* A;  // (D, N) contiguous
  const void* D;  // (D)
  const void* delta_bias;
  Strided3Out y;
};

// Runs rows of (batch, channel) [begin, end).
MAMBABLOCK_DECLARE_KERNEL(void, selective_state_update,
                          (const SelectiveStateUpdateParams&, int64_t begin, int64_t end));

}  // namespace mambablock
