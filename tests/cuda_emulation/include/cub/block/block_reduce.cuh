// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../emulation.h"

namespace cub {

enum BlockReduceAlgorithm {
  BLOCK_REDUCE_RAKING_COMMUTATIVE_ONLY,
  BLOCK_REDUCE_RAKING,
  BLOCK_REDUCE_WARP_REDUCTIONS,
};

template <class T, int THREADS, BlockReduceAlgorithm = BLOCK_REDUCE_WARP_REDUCTIONS>
class BlockReduce {
  using Place = emulation::Place;

 public:
  struct TempStorage {
    emulation::Storage<T, THREADS> values;
  };

  explicit BlockReduce(TempStorage& storage) : storage_(storage) {
    emulation::check_block(THREADS);
  }

  // Only the first thread gets the result.
  template <class Op>
  T Reduce(T input, Op op, Place place = Place::current()) {
    const int rank = int(mambablock_emulation::thread_rank());
    storage_.values[rank] = input;
    mambablock_emulation::sync_block("cub::BlockReduce", place);
    if (rank != 0) return emulation::undefined<T>();
    T total = storage_.values[0];
    for (int i = 1; i < THREADS; ++i) total = op(total, storage_.values[i]);
    return total;
  }

  template <int ITEMS, class Op>
  T Reduce(T (&inputs)[ITEMS], Op op, Place place = Place::current()) {
    return Reduce(emulation::combine(inputs, op), op, place);
  }

  T Sum(T input, Place place = Place::current()) { return Reduce(input, cub::Sum(), place); }

  template <int ITEMS>
  T Sum(T (&inputs)[ITEMS], Place place = Place::current()) {
    return Reduce(inputs, cub::Sum(), place);
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
