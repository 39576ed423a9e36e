// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../emulation.h"

namespace cub {

template <class T, int THREADS = 32>
class WarpReduce {
  using Place = emulation::Place;

 public:
  struct TempStorage {
    emulation::Storage<T, THREADS> values;
  };

  explicit WarpReduce(TempStorage& storage) : storage_(storage) {}

  // Only the first lane gets the result.
  template <class Op>
  T Reduce(T input, Op op, Place place = Place::current()) {
    const int lane = int(mambablock_emulation::thread_rank()) % THREADS;
    storage_.values[lane] = input;
    emulation::sync_segment(THREADS, place);
    if (lane != 0) return emulation::undefined<T>();
    T total = storage_.values[0];
    for (int i = 1; i < THREADS; ++i) total = op(total, storage_.values[i]);
    return total;
  }

  T Sum(T input, Place place = Place::current()) { return Reduce(input, cub::Sum(), place); }

 private:
  TempStorage& storage_;
};

}  // namespace cub
