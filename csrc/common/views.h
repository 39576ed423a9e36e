// SPDX-License-Identifier: Apache-2.0
//
// Views of tensors, with strides in elements. Time may run backward: reverse=True is a pointer to
// the last step and a negative stride.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace mambablock {

// A pack is this many neighbours, which a CUDA kernel moves by one access where they are contiguous
// and aligned.
inline constexpr int kPack = 4;
enum class PackDimension { kNone, kChannels, kSteps };

// An input of shape (batch, time, channel).
struct InputView {
  const void* data = nullptr;
  int64_t batch = 0, time = 0, channel = 0;
  PackDimension packs = PackDimension::kNone;
};

// An output of that shape, whose channels are contiguous.
struct OutputView {
  void* data = nullptr;
  int64_t batch = 0, time = 0;
  bool packs = false;
};

// An input of shape (batch, time, group, d_state).
struct GroupedView {
  const void* data = nullptr;
  int64_t batch = 0, time = 0, group = 0, state = 0;
  bool packs = false;  // of states
};

// A contiguous parameter; an absent one's data is null. The CPU's kernels take accumulators, CUDA's
// float32 or the activations' type.
struct ParameterView {
  const void* data = nullptr;
  DType dtype{};
  bool is_log = false;  // for CUDA's kernels: -exp(value) stands for each value
};

}  // namespace mambablock
