// SPDX-License-Identifier: Apache-2.0
//
// A thread's neighbouring channels of (B, L, D) tensors, moved at once where memory allows it.
#pragma once

#include <string.h>

#include <type_traits>

#include "device.cuh"

namespace mambablock {

inline constexpr int kChannelPack = 4;

template <class T>
using ChannelPack = Pack<T, kChannelPack>;

// The widest words that a pack is made of.
template <class T>
using PackWord = std::conditional_t<sizeof(ChannelPack<T>) == 8, uint2, uint4>;
template <class T>
inline constexpr int kPackWords = sizeof(ChannelPack<T>) / sizeof(PackWord<T>);

template <class T>
__device__ __forceinline__ ChannelPack<T> load_pack(const T* source) {
  struct Words {
    PackWord<T> words[kPackWords<T>];
  } words;
#pragma unroll
  for (int i = 0; i < kPackWords<T>; ++i) {
    words.words[i] = reinterpret_cast<const PackWord<T>*>(source)[i];
  }
  return bit_cast<ChannelPack<T>>(words);
}

template <class T>
__device__ __forceinline__ void store_pack(T* target, const ChannelPack<T>& pack) {
#pragma unroll
  for (int i = 0; i < kPackWords<T>; ++i) {
    PackWord<T> word;
    memcpy(&word, reinterpret_cast<const char*>(&pack) + i * sizeof word, sizeof word);
    reinterpret_cast<PackWord<T>*>(target)[i] = word;
  }
}

// Whether packs may be moved at once at any step, for channels at multiples of kChannelPack. It is
// the same for all threads, so that they go one way.
template <class T>
__device__ __forceinline__ bool movable_in_packs(const void* data, int64_t batch, int64_t time,
                                                 int64_t channel, int64_t channels) {
  constexpr int64_t size = alignof(ChannelPack<T>);
  return channel == 1 && channels % kChannelPack == 0 &&
         (reinterpret_cast<uintptr_t>(data) | batch * sizeof(T) | time * sizeof(T)) % size == 0;
}

// The thread's channels of a (B, L, D) input. `count` is how many there are from `channel` on, 0 or
// less where none is; `channels` how many lie side by side in all.
template <class T>
struct PackInput {
  __device__ PackInput(const Strided3& input, int64_t batch, int64_t channel, int count,
                       int64_t channels)
      : data(static_cast<const T*>(input.data) + batch * input.batch + channel * input.channel),
        time(input.time),
        channel(input.channel),
        count(count),
        packs(movable_in_packs<T>(input.data, input.batch, time, input.channel, channels)) {}

  // 0 where the step does not exist, and for channels that do not.
  __device__ __forceinline__ ChannelPack<T> load(int64_t step, bool exists = true) const {
    ChannelPack<T> pack{};
    const T* source = data + step * time;
    if (packs) {
      if (exists && count > 0) pack = load_pack(source);
    } else if (exists) {
#pragma unroll
      for (int j = 0; j < kChannelPack; ++j) {
        if (j < count) pack.values[j] = source[j * channel];
      }
    }
    return pack;
  }

  // Rows row, row + spacing, ... of a tile that begins at `begin` and has `steps` steps; `whole`
  // tells, the same for all threads, that they are all there.
  template <int kRows>
  __device__ __forceinline__ void load_rows(int64_t begin, int row, int spacing, int steps,
                                            bool whole, ChannelPack<T> (&rows)[kRows]) const {
    if (packs && whole) {
      const T* source = data + (begin + row) * time;
#pragma unroll
      for (int k = 0; k < kRows; ++k, source += spacing * time) {
        if (count > 0) rows[k] = load_pack(source);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        rows[k] = load(begin + row + k * spacing, row + k * spacing < steps);
      }
    }
  }

  const T* data;
  int64_t time, channel;
  int count;
  bool packs;
};

template <class T>
struct PackOutput {
  __device__ PackOutput(const Strided3Out& output, int64_t batch, int64_t channel, int count,
                        int64_t channels)
      : data(static_cast<T*>(output.data) + batch * output.batch + channel),
        time(output.time),
        count(count),
        packs(movable_in_packs<T>(output.data, output.batch, time, 1, channels)) {}

  __device__ __forceinline__ void store(int64_t step, const ChannelPack<T>& pack) const {
    T* target = data + step * time;
    if (packs) {
      if (count > 0) store_pack(target, pack);
    } else {
#pragma unroll
      for (int j = 0; j < kChannelPack; ++j) {
        if (j < count) target[j] = pack.values[j];
      }
    }
  }

  template <int kRows>
  __device__ __forceinline__ void store_rows(int64_t begin, int row, int spacing, int steps,
                                             bool whole,
                                             const ChannelPack<T> (&rows)[kRows]) const {
    if (packs && whole) {
      T* target = data + (begin + row) * time;
#pragma unroll
      for (int k = 0; k < kRows; ++k, target += spacing * time) {
        if (count > 0) store_pack(target, rows[k]);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        if (row + k * spacing < steps) store(begin + row + k * spacing, rows[k]);
      }
    }
  }

  T* data;
  int64_t time;
  int count;
  bool packs;
};

// A pack as accumulators.
template <class T>
__device__ __forceinline__ void widen(const ChannelPack<T>& pack,
                                      Accumulator<T> (&values)[kChannelPack]) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    // From the words that hold two, which takes one instruction for each.
    const uint2 words = bit_cast<uint2>(pack);
    values[0] = bit_cast<float>(words.x << 16);
    values[1] = bit_cast<float>(words.x & 0xffff0000u);
    values[2] = bit_cast<float>(words.y << 16);
    values[3] = bit_cast<float>(words.y & 0xffff0000u);
  } else {
#pragma unroll
    for (int j = 0; j < kChannelPack; ++j) values[j] = to_accumulator(pack.values[j]);
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
template <class T>
__device__ __forceinline__ ChannelPack<T> narrowed(const Accumulator<T> (&values)[kChannelPack]) {
  if constexpr (sizeof(T) == 2) {
    return bit_cast<ChannelPack<T>>(
        uint2{narrowed_pair<T>(values[0], values[1]), narrowed_pair<T>(values[2], values[3])});
  } else {
    return bit_cast<ChannelPack<T>>(values);
  }
}

}  // namespace mambablock
