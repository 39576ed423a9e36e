// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "selective_scan/params.h"

namespace mambablock {

// The forward's: u, delta, A, B and delta_bias, from a state of 0 to the final one. The backward's:
// dy in u's place, C in B's, and z, from a gradient of 0 to that of the initial state.
struct SelectiveScanCarry : SelectiveScanInputs {
  void* state = nullptr;   // (B|S, D, N)
  void* dt_sum = nullptr;  // (B|S, D), of each row's or sequence's steps
};

}  // namespace mambablock
