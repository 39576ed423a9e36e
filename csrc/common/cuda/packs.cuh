// SPDX-License-Identifier: Apache-2.0
//
// A thread's pack of channels of (B, L, D) tensors, which one access moves where memory is aligned.
#pragma once

#include <type_traits>

#include "common/cuda/vectors.cuh"
#include "common/views.h"

namespace mambablock {

// Neighbouring channels, in the widest words that an access moves: compilers keep these in
// registers as they are, which they do not with 16-bit values.
template <class T, int Count = kPack>
struct Pack {
  using Word = std::conditional_t<Count * sizeof(T) == 8, uint2, uint4>;
  static constexpr int words = Count * sizeof(T) / sizeof(Word);

  __device__ __forceinline__ static Pack load(const T* source) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < words; ++i) pack.word[i] = reinterpret_cast<const Word*>(source)[i];
    return pack;
  }

  __device__ __forceinline__ void store(T* target) const {
#pragma unroll
    for (int i = 0; i < words; ++i) reinterpret_cast<Word*>(target)[i] = word[i];
  }

  Word word[words];
};

// kSteps packs of channels whose steps are contiguous, and which are `stride` apart: transposed, so
// that pack k is that of step k. Channels past `count` become 0.
template <class T, int kSteps, int Count>
__device__ __forceinline__ void load_along_time(const T* source, int64_t stride, int count,
                                                Pack<T, Count> (&packs)[kSteps]) {
  AlignedVector<T, Count> transposed[kSteps]{};
#pragma unroll
  for (int j = 0; j < Count; ++j) {
    if (j < count) {
      const auto steps = *reinterpret_cast<const AlignedVector<T, kSteps>*>(source + j * stride);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) transposed[k].values[j] = steps.values[k];
    }
  }
#pragma unroll
  for (int k = 0; k < kSteps; ++k) packs[k] = bit_cast<Pack<T, Count>>(transposed[k]);
}

// A pack as accumulators.
template <class T, int Count>
__device__ __forceinline__ void widen(const Pack<T, Count>& pack, Accumulator<T> (&values)[Count]) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    // From the words that hold two, which takes one instruction for each.
    const auto words = bit_cast<AlignedVector<uint32_t, Count / 2>>(pack);
#pragma unroll
    for (int j = 0; j < Count / 2; ++j) {
      values[2 * j] = bit_cast<float>(words.values[j] << 16);
      values[2 * j + 1] = bit_cast<float>(words.values[j] & 0xffff0000u);
    }
  } else {
    const auto each = bit_cast<AlignedVector<T, Count>>(pack);
#pragma unroll
    for (int j = 0; j < Count; ++j) values[j] = to_accumulator(each.values[j]);
  }
}

// Two values as T, rounded, in one word.
template <class T>
__device__ __forceinline__ uint32_t narrowed_pair(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  return from_accumulator<T>(low).bits | uint32_t(from_accumulator<T>(high).bits) << 16;
#endif
}

// Values as a pack, each rounded.
template <class T, int Count>
__device__ __forceinline__ Pack<T, Count> narrowed(const Accumulator<T> (&values)[Count]) {
  if constexpr (sizeof(T) == 2) {
    AlignedVector<uint32_t, Count / 2> words;
#pragma unroll
    for (int j = 0; j < Count / 2; ++j) {
      words.values[j] = narrowed_pair<T>(values[2 * j], values[2 * j + 1]);
    }
    return bit_cast<Pack<T, Count>>(words);
  } else {
    return bit_cast<Pack<T, Count>>(values);
  }
}

}  // namespace mambablock
