// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "selective_scan_carry/params.h"

namespace mambablock {

// How a call is divided.
struct CarryCudaPlan {
  const int64_t* boundaries;  // (S+1), of a row's sequences; null without packed ones
  bool reverse, backward;
  int64_t chunks, chunk_steps;  // of a row
  void* state;                  // (B, chunks, D, N): what leaves each chunk if 0 enters it
  void* dt_sum;                 // (B, chunks, D): since the chunk's or the last sequence's start
};

// Channels of a block, a thread for each.
inline constexpr int kCarryChannels = 128;

// Blocks of a chunk of all rows.
inline int64_t cuda_carry_blocks(const SelectiveScanCarry& p) {
  return p.batch * ((p.channels + kCarryChannels - 1) / kCarryChannels);
}

void cuda_carry(const char* op, const SelectiveScanCarry& p, const CarryCudaPlan& plan,
                cudaStream_t stream);

}  // namespace mambablock
