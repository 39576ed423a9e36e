// SPDX-License-Identifier: Apache-2.0
//
// Pointers into tensors, with strides in elements. Time may run backward: reverse=True is a
// pointer to the last step and a negative stride.
#pragma once

#include <stdint.h>

namespace mambablock {

// An input of shape (batch, time, channel).
struct Strided3 {
  const void* data = nullptr;
  int64_t batch = 0, time = 0, channel = 0;
};

// An output of that shape, whose channels lie side by side.
struct Strided3Out {
  void* data = nullptr;
  int64_t batch = 0, time = 0;
};

// An input of shape (batch, time, group, d_state).
struct Strided4 {
  const void* data = nullptr;
  int64_t batch = 0, time = 0, group = 0, state = 0;
};

}  // namespace mambablock
