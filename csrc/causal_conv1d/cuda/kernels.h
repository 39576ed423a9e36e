// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "causal_conv1d/params.h"

namespace mambablock {

// How a call is divided: a thread takes a chunk of a row's time, and one partial sum of dweight and
// dbias stands for it.
struct ConvCudaPlan {
  const int64_t* boundaries;  // (S+1), of a row's sequences; null without packed ones
  bool reverse;
  int64_t chunks,
      chunk_steps;  // of a row, of which there is always one, for empty sequences' states
  // (B * chunks * (chunk_steps + W-1), D): what the backward of a d_conv above kCudaConvTaps
  // computes once for each step.
  void* gradients;
};

// The largest d_conv whose taps are kept in registers.
inline constexpr int kCudaConvTaps = 4;

void cuda_forward(const char* op, const CausalConv1dForward& p, const ConvCudaPlan& plan,
                  cudaStream_t stream);
void cuda_backward(const char* op, const CausalConv1dBackward& p, const ConvCudaPlan& plan,
                   cudaStream_t stream);

}  // namespace mambablock
