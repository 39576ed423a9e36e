// SPDX-License-Identifier: Apache-2.0
//
// Vectorised access, and helps for the compiler.
#pragma once

#include "common/convert.h"
#include "common/cuda/launch.cuh"

namespace mambablock {

// Aligned for vectorised access, of up to 16 bytes.
template <class T, int Count>
struct alignas(Count * sizeof(T) < 16 ? Count * sizeof(T) : 16) AlignedVector {
  T values[Count];
};

// Accumulators of one such access.
template <class A>
inline constexpr int kVectorLength = 16 / sizeof(A);

template <class A>
__device__ __forceinline__ AlignedVector<A, kVectorLength<A>> vector_at(const A* source) {
  return *reinterpret_cast<const AlignedVector<A, kVectorLength<A>>*>(source);
}

// Consecutive Count values of a type at least as large, at a multiple of their size.
template <class A, int Count>
__device__ __forceinline__ void load_vectors(const A* source, A (&values)[Count]) {
  static_assert(Count % kVectorLength<A> == 0);
#pragma unroll
  for (int i = 0; i < Count; i += kVectorLength<A>) {
    *reinterpret_cast<AlignedVector<A, kVectorLength<A>>*>(&values[i]) = vector_at(source + i);
  }
}

template <class A, int Count>
__device__ __forceinline__ void store_vectors(const A (&values)[Count], A* target) {
  static_assert(Count % kVectorLength<A> == 0);
#pragma unroll
  for (int i = 0; i < Count; i += kVectorLength<A>) {
    AlignedVector<A, kVectorLength<A>> vector;
#pragma unroll
    for (int j = 0; j < kVectorLength<A>; ++j) vector.values[j] = values[i + j];
    *reinterpret_cast<AlignedVector<A, kVectorLength<A>>*>(target + i) = vector;
  }
}

// Adds those at `source`.
template <class A, int Count>
__device__ __forceinline__ void add_vectors(const A* source, A (&values)[Count]) {
  A others[Count];
  load_vectors(source, others);
#pragma unroll
  for (int i = 0; i < Count; ++i) values[i] += others[i];
}

// The same value, from which the compiler computes nothing ahead of its use: hoisting common
// subexpressions out of a loop, for branches that are rarely taken too, makes registers run out.
__device__ __forceinline__ int64_t not_hoisted(int64_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(value));
#endif
  return value;
}

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// Calls function(Flag<flag>), so that what follows from the flag is decided once.
template <class F>
__device__ __forceinline__ void with_flag(bool flag, F function) {
  if (flag) {
    function(Flag<true>());
  } else {
    function(Flag<false>());
  }
}

}  // namespace mambablock
