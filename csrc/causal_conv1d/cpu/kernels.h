// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "causal_conv1d/params.h"
#include "common/cpu/simd_level.h"
#include "common/time_segments.h"

namespace mambablock {

// A work item is this many channels of a chunk of time: of this many consecutive segments, each of
// at most so many steps.
inline constexpr int64_t kConvChannelBlock = 64, kConvSegmentChunk = 2, kConvTimeTile = 128;

inline int64_t conv_blocks(const CausalConv1dInputs& p) {
  return (p.channels + kConvChannelBlock - 1) / kConvChannelBlock;
}

inline int64_t conv_chunks(RowSegments segments) {
  return (segments.count + kConvSegmentChunk - 1) / kConvSegmentChunk;
}

inline int64_t conv_work_items(const CausalConv1dInputs& p, RowSegments segments) {
  return p.batch * conv_chunks(segments) * conv_blocks(p);
}

// Both run the work items [begin, end), in any order and on any thread.
MAMBABLOCK_DECLARE_KERNEL(void, causal_conv1d_forward,
                          (const CausalConv1dForward&, RowSegments, int64_t begin, int64_t end));
MAMBABLOCK_DECLARE_KERNEL(void, causal_conv1d_backward,
                          (const CausalConv1dBackward&, RowSegments, int64_t begin, int64_t end));

}  // namespace mambablock
