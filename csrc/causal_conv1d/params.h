// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/cpu/simd_level.h"
#include "common/views.h"
#include "common/time_segments.h"

namespace mambablock {

// Shapes as in the op's schema. Parameters and states are float, or double for float64
// activations; an absent argument is a null pointer.
struct CausalConv1dParams {
  DType dtype;
  int64_t batch, length, channels, width;
  bool silu;

  Strided3 x;                 // (B, L, D)
  const void* weight;         // (D, W) contiguous
  const void* bias;           // (D)
  const void* initial_state;  // (B|S, W-1, D) contiguous

  int64_t sequences;  // in one row

  // On the CPU, the segments of one row.
  const Segment* segments;
  int64_t segment_count;

  // On CUDA, the boundaries of a row's sequences: (S+1), null without packed sequences.
  const int64_t* boundaries;
  bool reverse;

  // Forward only.
  Strided3Out y;
  void* final_state;

  // Backward only.
  Strided3 dy;
  const void* dfinal_state;
  Strided3Out dx;
  void* dinitial_state;
  // One partial sum per chunk of segments (on CUDA of steps), added up by the op in a fixed order.
  void* dweight_partial;  // (B * chunks, D, W)
  void* dbias_partial;    // (B * chunks, D)
};

// A work item is this many channels of this many consecutive segments, each of at most so many
// steps.
inline constexpr int64_t kConvChannelBlock = 64, kConvSegmentChunk = 2, kConvTimeTile = 128;

inline int64_t causal_conv1d_blocks(const CausalConv1dParams& p) {
  return (p.channels + kConvChannelBlock - 1) / kConvChannelBlock;
}

inline int64_t causal_conv1d_chunks(const CausalConv1dParams& p) {
  return (p.segment_count + kConvSegmentChunk - 1) / kConvSegmentChunk;
}

inline int64_t causal_conv1d_work_items(const CausalConv1dParams& p) {
  return p.batch * causal_conv1d_chunks(p) * causal_conv1d_blocks(p);
}

// Both run the work items [begin, end), in any order and on any thread.
MAMBABLOCK_DECLARE_KERNEL(void, causal_conv1d_forward,
                          (const CausalConv1dParams&, int64_t begin, int64_t end));
MAMBABLOCK_DECLARE_KERNEL(void, causal_conv1d_backward,
                          (const CausalConv1dParams&, int64_t begin, int64_t end));

}  // namespace mambablock
