// SPDX-License-Identifier: Apache-2.0
//
// Access to memory, vectorised and of parameters, and helps for the compiler.
#pragma once

#include "common/convert.h"
#include "common/cuda/launch.cuh"
#include "common/views.h"

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

// A value of a parameter that is float32 or T, and is there.
template <class T>
__device__ __forceinline__ Accumulator<T> parameter_at(const ParameterView& parameter, int64_t at) {
  if (std::is_same_v<T, float> || parameter.dtype == DType::float32) {
    return static_cast<const float*>(parameter.data)[at];
  }
  return to_accumulator(static_cast<const T*>(parameter.data)[at]);
}

// What stands for a parameter's value.
template <class A>
__device__ __forceinline__ A represented(const ParameterView& parameter, A value) {
  return parameter.is_log ? negative_exp(value) : value;
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
