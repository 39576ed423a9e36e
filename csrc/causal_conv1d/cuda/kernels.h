// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "causal_conv1d/params.h"
#include "common/math.h"

namespace mambablock {

// How a call is divided.
struct ConvCudaPlan {
  const int64_t* boundaries;  // (S+1), of a row's sequences; null without packed ones
  bool reverse;
};

// Steps of a chunk of time, which one thread processes; one partial sum of dweight and dbias stands
// for as many.
inline constexpr int64_t kCudaConvChunk = 64;

// Chunks of a row, of which there is always one, to give empty sequences their states.
MAMBABLOCK_INLINE int64_t cuda_conv_chunks(const CausalConv1dInputs& p) {
  return p.length == 0 ? 1 : (p.length + kCudaConvChunk - 1) / kCudaConvChunk;
}

void cuda_forward(const char* op, const CausalConv1dForward& p, const ConvCudaPlan& plan,
                  cudaStream_t stream);
void cuda_backward(const char* op, const CausalConv1dBackward& p, const ConvCudaPlan& plan,
                   cudaStream_t stream);

}  // namespace mambablock
