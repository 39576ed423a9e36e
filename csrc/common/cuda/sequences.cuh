// SPDX-License-Identifier: Apache-2.0
//
// The sequences of one row, as kernels on the device see them: with reverse=True, of the flipped
// row.
#pragma once

#include "common/cuda/vectors.cuh"

namespace mambablock {

struct Sequences {
  const int64_t* boundaries;  // (count + 1), rising from 0 to length; null where count is 1
  int64_t count, length;
  bool reverse;

  // Where sequence s begins, and the one before ends.
  __device__ int64_t begin(int64_t s) const {
    return boundaries == nullptr ? s * length : boundaries[s];
  }

  // The first boundary that is not before `time`.
  __device__ int64_t first_from(int64_t time) const {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (begin(middle) < time) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // The row of the states that belongs to sequence s.
  __device__ int64_t state_row(int64_t batch, int64_t s) const {
    return batch * count + (reverse ? count - 1 - s : s);
  }
};

// The sequence that a step belongs to, and where it ends.
struct SequenceCursor {
  int64_t sequence, end;
};

// Starts the sequences from s on that begin at `time`: load(s) for each, and store(s) for those
// that end there too. Returns the one that continues; where none is left, its end is never reached.
template <class Load, class Store>
__device__ SequenceCursor start_sequences(const Sequences& sequences, int64_t s, int64_t time,
                                          Load load, Store store) {
  for (; s < sequences.count; ++s) {
    load(s);
    const int64_t end = sequences.begin(s + 1);
    if (end > time) return {s, end};
    store(s);
  }
  return {s, INT64_MAX};
}

}  // namespace mambablock
