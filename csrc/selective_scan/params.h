// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "../common/dtype.h"
#include "../common/simd_level.h"
#include "../common/strided.h"
#include "../common/time_segments.h"

namespace mambablock {

// Shapes as in the op's schema. `Parameter` and `State` pointers are float, or double for float64
// activations; an absent argument is a null pointer.
struct SelectiveScanParams {
  DType dtype;
  int64_t batch, length, channels, d_state, groups;
  bool delta_softplus;

  Strided3 u, delta, z;  // (B, L, D)
  Strided4 B, C;         // (B, L, G, N)
  const void* A;         // (D, N) contiguous
  const void* D;         // (D)
  const void* delta_bias;
  const void* initial_state;  // (B|S, D, N) contiguous

  const Segment* segments;  // of one row
  int64_t segment_count;
  int64_t sequences;  // in one row

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
  // One partial sum per block, or per row of the batch, added up by the op in a fixed order.
  Strided3Out dB_partial, dC_partial;  // (blocks in a group * B, L, G * N)
  void* dA_partial;                    // (B, D, N)
  void* dD_partial;                    // (B, D)
  void* ddelta_bias_partial;
};

// A work item is a block of this many channels within one group; so are the partial sums, which are
// therefore the same however blocks are shared out among threads.
inline constexpr int64_t kScanChannelBlock = 128;

inline int64_t selective_scan_blocks_in_group(const SelectiveScanParams& p) {
  return (p.channels / p.groups + kScanChannelBlock - 1) / kScanChannelBlock;
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
