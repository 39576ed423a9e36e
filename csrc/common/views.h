// SPDX-License-Identifier: Apache-2.0
//
// Pointers into tensors, with strides in elements. Time may run backward: reverse=True is a
// pointer to the last step and a negative stride.
#pragma once

#include <stdint.h>

namespace mambablock {

// Neighbours that CUDA kernels move at once where they lie side by side and their memory is
// aligned.
inline constexpr int kPack = 4;
enum class Packs { kNone, kChannels, kSteps };

// An input of shape (batch, time, channel).
struct Strided3 {
  const void* data = nullptr;
  int64_t batch = 0, time = 0, channel = 0;
  Packs packs = Packs::kNone;
};

// An output of that shape, whose channels lie side by side.
struct Strided3Out {
  void* data = nullptr;
  int64_t batch = 0, time = 0;
  bool packs = false;
};

// An input of shape (batch, time, group, d_state).
struct Strided4 {
  const void* data = nullptr;
  int64_t batch = 0, time = 0, group = 0, state = 0;
  bool packs = false;  // of states
};

}  // namespace mambablock
