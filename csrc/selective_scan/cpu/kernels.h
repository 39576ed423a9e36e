// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cpu/simd_level.h"
#include "common/time_segments.h"
#include "selective_scan/params.h"

namespace mambablock {

// A work item is a block of at most this many channels of one group. Partial sums are a block's
// too, and so the same however blocks are distributed over threads.
inline constexpr int64_t kScanChannelBlock = 128;

// Steps in a segment of time, at most; every multiple of them has one saved state.
inline constexpr int64_t kScanTimeTile = 32;

inline int64_t scan_tiles(const SelectiveScanInputs& p) {
  return (p.length + kScanTimeTile - 1) / kScanTimeTile;
}

inline int64_t scan_blocks_in_group(const SelectiveScanInputs& p) {
  return (p.group_channels + kScanChannelBlock - 1) / kScanChannelBlock;
}

inline int64_t scan_work_items(const SelectiveScanInputs& p) {
  return p.batch * p.groups * scan_blocks_in_group(p);
}

// Both run the work items [begin, end), in any order and on any thread.
MAMBABLOCK_DECLARE_KERNEL(void, selective_scan_forward,
                          (const SelectiveScanForward&, RowSegments, int64_t begin, int64_t end));
MAMBABLOCK_DECLARE_KERNEL(void, selective_scan_backward,
                          (const SelectiveScanBackward&, RowSegments, int64_t begin, int64_t end));

}  // namespace mambablock
