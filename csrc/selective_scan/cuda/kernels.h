// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#include "selective_scan/params.h"

namespace mambablock {

// How a call is divided.
struct ScanCudaPlan {
  const int64_t* boundaries;  // (S+1), of a row's sequences; null without packed ones
  bool reverse;
  int64_t saved;                // states of a row that are saved for the backward
  int64_t chunks, chunk_steps;  // of a row, each of as many steps but for the last
  // (B, chunks, D, N): each chunk's carry-in, the state or in the backward its gradient.
  // Where a block holds only a slice of the states, spill space for the others; may be null.
  void* carry;
  void* carry_dt;  // (B, chunks, D): the sum of dt over a chunk
};

// Steps of a tile of the forward, of which a chunk has a whole number.
inline constexpr int kCudaTile = 16;

// Steps between saved states, which are a tile of the backward: it keeps their decays and states in
// registers. Those of bfloat16 activations are bfloat16 too.
inline constexpr int kCudaSavedSteps = 8;
template <class T>
using SavedState = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, Accumulator<T>>;

// The channels of a block.
inline constexpr int kCudaForwardChannels = 64;
template <class A>
inline constexpr int kCudaBackwardChannels = sizeof(A) == 8 ? 32 : 64;

// Blocks of `channels` channels in one group.
inline int64_t cuda_blocks_in_group(int64_t group_channels, int channels) {
  return (group_channels + channels - 1) / channels;
}

inline int64_t cuda_blocks(const SelectiveScanInputs& p, const ScanCudaPlan& plan, int channels) {
  return p.batch * plan.chunks * p.groups * cuda_blocks_in_group(p.group_channels, channels);
}

inline bool in_packs(const InputView& input) { return input.packs == PackDimension::kChannels; }

// Whether a call is one for the kernels that test nothing: blocks of `channels` channels are full,
// their states are as many as they hold at once, a row is one sequence, and all inputs are in
// packs.
inline bool is_regular(const SelectiveScanInputs& p, const ScanCudaPlan& plan, int channels,
                       int states) {
  return p.length > 0 && p.group_channels % channels == 0 && p.d_state == states &&
         plan.boundaries == nullptr && in_packs(p.u) && in_packs(p.delta) &&
         (p.z.data == nullptr || in_packs(p.z)) && p.B.packs && p.C.packs;
}

// How many states a block holds from tile to tile; the others are in the plan's carry.
inline int cuda_states_held(DType dtype) { return dtype == DType::float64 ? 8 : 16; }

// Fill the plan's carry with the state that enters each chunk, and carry_dt. They are needed where
// there are several chunks, before the forward and the backward.
void cuda_forward_carries(const char* op, const SelectiveScanInputs& p, const ScanCudaPlan& plan,
                          cudaStream_t stream);
void cuda_backward_carries(const char* op, const SelectiveScanBackward& p, const ScanCudaPlan& plan,
                           cudaStream_t stream);

void cuda_forward(const char* op, const SelectiveScanForward& p, const ScanCudaPlan& plan,
                  cudaStream_t stream);

void cuda_backward(const char* op, const SelectiveScanBackward& p, const ScanCudaPlan& plan,
                   cudaStream_t stream);

}  // namespace mambablock
