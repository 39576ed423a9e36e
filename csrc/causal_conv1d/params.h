// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/views.h"

namespace mambablock {

// Shapes as in the operator's schema. States are contiguous, of float, or double for float64
// activations; an absent argument is a null pointer.
struct CausalConv1dInputs {
  DType dtype;
  int64_t batch, length, channels, width;
  int64_t sequences;  // in one row
  bool silu;

  InputView x;                // (B, L, D)
  ParameterView weight;       // (D, W)
  ParameterView bias;         // (D)
  const void* initial_state;  // (B|S, W-1, D)
};

struct CausalConv1dForward : CausalConv1dInputs {
  OutputView y{};               // (B, L, D)
  void* final_state = nullptr;  // (B|S, W-1, D)
};

struct CausalConv1dBackward : CausalConv1dInputs {
  InputView dy{};                      // (B, L, D)
  const void* dfinal_state = nullptr;  // (B|S, W-1, D)
  OutputView dx{};                     // (B, L, D)
  void* dinitial_state = nullptr;
  // One partial sum per chunk of time of each row, which op.cpp adds up in a fixed order.
  void* dweight_partial = nullptr;  // (B * chunks, D, W)
  void* dbias_partial = nullptr;    // (B * chunks, D)
};

}  // namespace mambablock
