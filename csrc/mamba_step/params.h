// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "causal_conv1d_update/params.h"
#include "linear/params.h"
#include "selective_state_update/params.h"

namespace mambablock {

// A parameter (rows, columns) and where a step puts it as accumulators; null where it is used as it
// is.
struct StepParameter {
  const void* data;
  DType dtype;
  int64_t columns;
  void* accumulators;
};

// One time step of a Mamba block, made of the operators of one step: between them activations are
// accumulators.
struct MambaStepParams {
  LinearParams in_proj, x_proj, dt_proj, out_proj;
  CausalConv1dUpdateParams conv;
  SelectiveStateUpdateParams scan;

  // Of d_inner rows each: the convolution's weight and bias, delta's bias, and D.
  StepParameter parameters[4];
  StepParameter A_log;  // becomes A = -exp(A_log)

  // RMS norms of dt, B and C, which follow one another in x_proj's output.
  bool norms;
  double norm_eps;
  int64_t norm_sizes[3];
  const void* norm_weights[3];  // accumulators; null for ones
};

}  // namespace mambablock
