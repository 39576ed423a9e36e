// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/cpu/simd_level.h"
#include "common/views.h"
#include "common/time_segments.h"

namespace mambablock {

// Shapes as in the op's schema. `Parameter` and `State` pointers are float, or double for float64
// activations; an absent argument is a null pointer.
struct SelectiveScanParams {
  DType dtype;
  int64_t batch, length, channels, d_state;
  int64_t groups, group_channels;  // of B and C; the channels of each
  bool delta_softplus;

  Strided3 u, delta, z;  // (B, L, D)
  Strided4 B, C;         // (B, L, G, N)
  const void* A;         // (D, N) contiguous
  const void* D;         // (D)
  const void* delta_bias;
  const void* initial_state;  // (B|S, D, N) contiguous

  int64_t sequences;  // in one row

  // On the CPU, the segments of one row.
  const Segment* segments;
  int64_t segment_count;

  // On CUDA, the boundaries of a row's sequences, and the chunks of time that are worked on side by
  // side, each of as many tiles but for the last.
  const int64_t* boundaries;  // (S+1), null without packed sequences
  bool reverse;
  int64_t chunks, chunk_tiles;
  // (B, chunks, D, N): the state on entering a chunk, in the backward's direction its gradient.
  // Where the states are more than a thread's registers hold, those not at hand; may be null.
  void* carry;
  void* carry_dt;  // (B, chunks, D): the sum of dt over a chunk

  void* saved_states;  // (B, tiles * N, D): the state on entering each tile
  int64_t tiles;

  // Forward only.
  Strided3Out y;
  void* final_state;

  // Backward only; outputs (B, L, D) in the activations' type.
  Strided3 dy;
  const void* dfinal_state;
  Strided3Out du, ddelta, dz;
  void* dinitial_state;
  // Partial sums, added up by the op in a fixed order: one per block, or per row of the batch (on
  // CUDA per chunk).
  Strided3Out dB_partial, dC_partial;  // (blocks in a group * B, L, G * N)
  void* dA_partial;                    // (rows, D, N)
  void* dD_partial;                    // (rows, D)
  void* ddelta_bias_partial;
};

// A work item is a block of this many channels within one group; so are the partial sums, which are
// therefore the same however blocks are shared out among threads.
inline constexpr int64_t kScanChannelBlock = 128;

// Steps in a segment of time, at most; every multiple of them has one saved state on the CPU.
inline constexpr int64_t kScanTimeTile = 32;

inline int64_t scan_time_tiles(int64_t length) {
  return (length + kScanTimeTile - 1) / kScanTimeTile;
}

inline int64_t selective_scan_blocks_in_group(const SelectiveScanParams& p) {
  return (p.group_channels + kScanChannelBlock - 1) / kScanChannelBlock;
}

inline int64_t selective_scan_work_items(const SelectiveScanParams& p) {
  return p.batch * p.groups * selective_scan_blocks_in_group(p);
}

// Both run the work items [begin, end), in any order and on any thread.
MAMBABLOCK_DECLARE_KERNEL(void, selective_scan_forward,
                          (const SelectiveScanParams&, int64_t begin, int64_t end));
MAMBABLOCK_DECLARE_KERNEL(void, selective_scan_backward,
                          (const SelectiveScanParams&, int64_t begin, int64_t end));

}  // namespace mambablock
