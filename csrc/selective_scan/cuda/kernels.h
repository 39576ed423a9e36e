// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "selective_scan/params.h"

namespace mambablock {

// Steps between saved states, which are the steps that a block takes at once.
inline constexpr int kCudaTile = 16;

// The channels of a forward block, a thread for each.
inline constexpr int kCudaForwardChannels = 64;

// Blocks of `channels` channels in one group.
inline int64_t cuda_blocks_in_group(const SelectiveScanParams& p, int channels) {
  return (p.group_channels + channels - 1) / channels;
}

// How many states a block holds from tile to tile; more are in p.carry.
inline int cuda_states_held(DType dtype) { return dtype == DType::float64 ? 4 : 16; }

// The bytes of shared memory that a backward block of `channels` channels needs.
size_t cuda_backward_shared_memory(DType dtype, int channels);

// Fill p.carry and p.carry_dt: each chunk alone, and then what enters each chunk. They are needed
// where there are several chunks, before the forward and the backward.
void cuda_forward_carries(const char* op, const SelectiveScanParams& p, cudaStream_t stream);
void cuda_backward_carries(const char* op, const SelectiveScanParams& p, cudaStream_t stream);

void cuda_forward(const char* op, const SelectiveScanParams& p, cudaStream_t stream);

// With blocks of 64 channels, which only 16-bit types have, or of 32.
void cuda_backward(const char* op, const SelectiveScanParams& p, int channels, cudaStream_t stream);

}  // namespace mambablock
