// SPDX-License-Identifier: Apache-2.0
//
// What the emulated collectives of CUB share: each thread writes its value to the TempStorage, and
// after a barrier each reads what it needs. As with CUB, who uses a TempStorage again must
// synchronise in between.
#pragma once

#include <string.h>

#include <stdexcept>

#include "../emulation/intrinsics.h"

namespace cub {

struct Sum {
  template <class T>
  T operator()(const T& a, const T& b) const {
    return a + b;
  }
};

namespace emulation {

using mambablock_emulation::Place;

// Room for values, uninitialised as shared memory is.
template <class T, int COUNT>
struct Storage {
  alignas(T) unsigned char bytes[COUNT * sizeof(T)];
  T& operator[](int i) { return reinterpret_cast<T*>(bytes)[i]; }
};

inline void check_block(int threads) {
  if (int(mambablock_emulation::block_size()) != threads) {
    throw std::runtime_error("CUDA emulation: a cub collective is not of its block's size");
  }
}

// The lanes of the caller's segment of a warp wait for each other.
inline void sync_segment(int lanes, const Place& place) {
  const unsigned first = mambablock_emulation::thread_rank() % 32 / lanes * lanes;
  const unsigned mask = (lanes == 32 ? ~0u : (1u << lanes) - 1) << first;
  mambablock_emulation::sync_warp(mambablock_emulation::WarpOp::sync, mask, 0, 0, 32, place);
}

// What a thread holds that does not get a collective's result.
template <class T>
T undefined() {
  T value;
  memset(static_cast<void*>(&value), 0xff, sizeof(T));
  return value;
}

// The threads' own items, in order, combined.
template <class T, int ITEMS, class Op>
T combine(T (&items)[ITEMS], Op op) {
  T total = items[0];
  for (int i = 1; i < ITEMS; ++i) total = op(total, items[i]);
  return total;
}

// What lies before a thread's own items: nothing for the first thread without an initial value.
template <class T>
struct Prefix {
  bool given;
  T value;

  template <class Op>
  void append(const T& next, Op op) {
    value = given ? op(value, next) : next;
    given = true;
  }
};

template <class T, int ITEMS, class Op>
void scan_items(T (&input)[ITEMS], T (&output)[ITEMS], Prefix<T> prefix, bool inclusive, Op op) {
  for (int i = 0; i < ITEMS; ++i) {
    const T item = input[i];
    if (!inclusive && prefix.given) output[i] = prefix.value;
    prefix.append(item, op);
    if (inclusive) output[i] = prefix.value;
  }
}

}  // namespace emulation
}  // namespace cub
