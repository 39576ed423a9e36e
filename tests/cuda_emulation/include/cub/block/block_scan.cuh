// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../emulation.h"

namespace cub {

enum BlockScanAlgorithm {
  BLOCK_SCAN_RAKING,
  BLOCK_SCAN_RAKING_MEMOIZE,
  BLOCK_SCAN_WARP_SCANS,
};

template <class T, int THREADS, BlockScanAlgorithm = BLOCK_SCAN_RAKING>
class BlockScan {
  using Place = emulation::Place;

 public:
  struct TempStorage {
    emulation::Storage<T, THREADS> totals;
    emulation::Storage<T, 1> block_prefix;
  };

  explicit BlockScan(TempStorage& storage) : storage_(storage) { emulation::check_block(THREADS); }

  template <int ITEMS, class Op>
  void InclusiveScan(T (&input)[ITEMS], T (&output)[ITEMS], Op op, Place place = Place::current()) {
    share(input, op, place);
    emulation::scan_items(input, output, before({}, op), true, op);
  }

  template <int ITEMS, class Op>
  void InclusiveScan(T (&input)[ITEMS], T (&output)[ITEMS], Op op, T& block_aggregate,
                     Place place = Place::current()) {
    InclusiveScan(input, output, op, place);
    block_aggregate = aggregate(op);
  }

  template <int ITEMS, class Op, class Callback>
  void InclusiveScan(T (&input)[ITEMS], T (&output)[ITEMS], Op op, Callback& callback,
                     Place place = Place::current()) {
    share(input, op, place);
    const T prefix = block_prefix(op, callback, place);
    emulation::scan_items(input, output, before({true, prefix}, op), true, op);
  }

  template <int ITEMS, class Op>
  void ExclusiveScan(T (&input)[ITEMS], T (&output)[ITEMS], T initial, Op op,
                     Place place = Place::current()) {
    share(input, op, place);
    emulation::scan_items(input, output, before({true, initial}, op), false, op);
  }

  template <int ITEMS, class Op>
  void ExclusiveScan(T (&input)[ITEMS], T (&output)[ITEMS], T initial, Op op, T& block_aggregate,
                     Place place = Place::current()) {
    ExclusiveScan(input, output, initial, op, place);
    block_aggregate = aggregate(op);
  }

  template <int ITEMS, class Op, class Callback>
  void ExclusiveScan(T (&input)[ITEMS], T (&output)[ITEMS], Op op, Callback& callback,
                     Place place = Place::current()) {
    share(input, op, place);
    const T prefix = block_prefix(op, callback, place);
    emulation::scan_items(input, output, before({true, prefix}, op), false, op);
  }

  // The forms of one item per thread.
  template <class Op>
  void InclusiveScan(T input, T& output, Op op, Place place = Place::current()) {
    InclusiveScan(array(input), array(output), op, place);
  }

  template <class Op>
  void InclusiveScan(T input, T& output, Op op, T& block_aggregate,
                     Place place = Place::current()) {
    InclusiveScan(array(input), array(output), op, block_aggregate, place);
  }

  template <class Op, class Callback>
  void InclusiveScan(T input, T& output, Op op, Callback& callback,
                     Place place = Place::current()) {
    InclusiveScan(array(input), array(output), op, callback, place);
  }

  template <class Op>
  void ExclusiveScan(T input, T& output, T initial, Op op, Place place = Place::current()) {
    ExclusiveScan(array(input), array(output), initial, op, place);
  }

  template <class Op>
  void ExclusiveScan(T input, T& output, T initial, Op op, T& block_aggregate,
                     Place place = Place::current()) {
    ExclusiveScan(array(input), array(output), initial, op, block_aggregate, place);
  }

  template <class Op, class Callback>
  void ExclusiveScan(T input, T& output, Op op, Callback& callback,
                     Place place = Place::current()) {
    ExclusiveScan(array(input), array(output), op, callback, place);
  }

  void InclusiveSum(T input, T& output, Place place = Place::current()) {
    InclusiveScan(input, output, Sum(), place);
  }

  void ExclusiveSum(T input, T& output, Place place = Place::current()) {
    ExclusiveScan(input, output, T{}, Sum(), place);
  }

 private:
  static T (&array(T& value))[1] { return reinterpret_cast<T(&)[1]>(value); }

  template <int ITEMS, class Op>
  void share(T (&input)[ITEMS], Op op, const Place& place) {
    storage_.totals[rank_] = emulation::combine(input, op);
    mambablock_emulation::sync_block("cub::BlockScan", place);
  }

  template <class Op>
  emulation::Prefix<T> before(emulation::Prefix<T> prefix, Op op) {
    for (int i = 0; i < rank_; ++i) prefix.append(storage_.totals[i], op);
    return prefix;
  }

  template <class Op>
  T aggregate(Op op) {
    T total = storage_.totals[0];
    for (int i = 1; i < THREADS; ++i) total = op(total, storage_.totals[i]);
    return total;
  }

  // The first warp calls it, and what its first lane gets counts.
  template <class Op, class Callback>
  T block_prefix(Op op, Callback& callback, const Place& place) {
    if (rank_ < 32) {
      const T prefix = callback(aggregate(op));
      if (rank_ == 0) storage_.block_prefix[0] = prefix;
    }
    mambablock_emulation::sync_block("cub::BlockScan's prefix", place);
    return storage_.block_prefix[0];
  }

  TempStorage& storage_;
  const int rank_ = int(mambablock_emulation::thread_rank());
};

}  // namespace cub
