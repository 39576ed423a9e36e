// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../emulation.h"

namespace cub {

template <class T, int THREADS = 32>
class WarpScan {
  using Place = emulation::Place;

 public:
  struct TempStorage {
    emulation::Storage<T, THREADS> values;
  };

  explicit WarpScan(TempStorage& storage) : storage_(storage) {}

  template <class Op>
  void InclusiveScan(T input, T& output, Op op, Place place = Place::current()) {
    share(input, place);
    emulation::Prefix<T> prefix{};
    for (int i = 0; i <= lane_; ++i) prefix.append(storage_.values[i], op);
    output = prefix.value;
  }

  template <class Op>
  void InclusiveScan(T input, T& output, Op op, T& warp_aggregate, Place place = Place::current()) {
    InclusiveScan(input, output, op, place);
    warp_aggregate = aggregate(op);
  }

  template <class Op>
  void ExclusiveScan(T input, T& output, T initial, Op op, Place place = Place::current()) {
    share(input, place);
    emulation::Prefix<T> prefix{true, initial};
    for (int i = 0; i < lane_; ++i) prefix.append(storage_.values[i], op);
    output = prefix.value;
  }

  template <class Op>
  void ExclusiveScan(T input, T& output, T initial, Op op, T& warp_aggregate,
                     Place place = Place::current()) {
    ExclusiveScan(input, output, initial, op, place);
    warp_aggregate = aggregate(op);
  }

  void InclusiveSum(T input, T& output, Place place = Place::current()) {
    InclusiveScan(input, output, Sum(), place);
  }

 private:
  void share(T input, const Place& place) {
    storage_.values[lane_] = input;
    emulation::sync_segment(THREADS, place);
  }

  template <class Op>
  T aggregate(Op op) {
    T total = storage_.values[0];
    for (int i = 1; i < THREADS; ++i) total = op(total, storage_.values[i]);
    return total;
  }

  TempStorage& storage_;
  const int lane_ = int(mambablock_emulation::thread_rank()) % THREADS;
};

}  // namespace cub
