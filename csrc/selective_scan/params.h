// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/views.h"

namespace mambablock {

// Shapes as in the operator's schema. States are contiguous, of float, or double for float64
// activations; an absent argument is a null pointer.
struct SelectiveScanInputs {
  DType dtype;
  int64_t batch, length, channels, d_state;
  int64_t groups, group_channels;  // of B and C; the channels of each
  int64_t sequences;               // in one row
  bool delta_softplus;

  InputView u, delta, z;      // (B, L, D)
  GroupedView B, C;           // (B, L, G, N)
  ParameterView A;            // (D, N)
  ParameterView D;            // (D)
  ParameterView delta_bias;   // (D)
  const void* initial_state;  // (B|S, D, N)
};

struct SelectiveScanForward : SelectiveScanInputs {
  OutputView y{};                // (B, L, D)
  void* final_state = nullptr;   // (B|S, D, N)
  void* saved_states = nullptr;  // (B, saved * N, D): states on entering steps evenly apart
};

struct SelectiveScanBackward : SelectiveScanInputs {
  InputView dy{};                      // (B, L, D)
  const void* dfinal_state = nullptr;  // (B|S, D, N)
  const void* saved_states = nullptr;
  OutputView du{}, ddelta{}, dz{};  // (B, L, D)
  void* dinitial_state = nullptr;
  // Partial sums, which op.cpp adds up in a fixed order: of dB and dC one per block of channels, of
  // the others one per row of the batch (on CUDA per chunk of time).
  OutputView dB_partial{}, dC_partial{};  // (blocks in a group * B, L, G * N)
  void* dA_partial = nullptr;             // (rows, D, N)
  void* dD_partial = nullptr;             // (rows, D)
  void* ddelta_bias_partial = nullptr;    // (rows, D)
};

}  // namespace mambablock
