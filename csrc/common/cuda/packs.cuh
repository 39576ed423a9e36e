// SPDX-License-Identifier: Apache-2.0
//
// A thread's pack of channels of (B, L, D) tensors, which one access moves where memory is aligned.
#pragma once

#include <type_traits>

#include "common/cuda/vectors.cuh"
#include "common/views.h"

namespace mambablock {

// A pack of channels, in the widest words that an access moves: compilers keep these in registers
// as they are, which they do not with 16-bit values.
template <class T>
struct Pack {
  using Word = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  static constexpr int words = kPack * sizeof(T) / sizeof(Word);

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
template <class T, int kSteps>
__device__ __forceinline__ void load_along_time(const T* source, int64_t stride, int count,
                                                Pack<T> (&packs)[kSteps]) {
  AlignedVector<T, kPack> transposed[kSteps]{};
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    if (j < count) {
      const auto steps = *reinterpret_cast<const AlignedVector<T, kSteps>*>(source + j * stride);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) transposed[k].values[j] = steps.values[k];
    }
  }
#pragma unroll
  for (int k = 0; k < kSteps; ++k) packs[k] = bit_cast<Pack<T>>(transposed[k]);
}

// The thread's channels of a (B, L, D) input. `count` is how many there are from `channel` on, 0 or
// less where none is.
template <class T>
struct ChannelsInput {
  __device__ ChannelsInput(const InputView& input, int64_t batch, int64_t channel, int count)
      : data(static_cast<const T*>(input.data) + batch * input.batch + channel * input.channel),
        time(input.time),
        channel(input.channel),
        count(count),
        packs(input.packs) {}

  // 0 for channels that do not exist.
  __device__ __forceinline__ Pack<T> load(int64_t step) const {
    const T* source = data + step * time;
    if (packs == PackDimension::kChannels) {
      if (count > 0) return Pack<T>::load(source);
      return {};
    }
    AlignedVector<T, kPack> pack{};
    const int64_t stride = not_hoisted(channel);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      if (j < count) pack.values[j] = source[j * stride];
    }
    return bit_cast<Pack<T>>(pack);
  }

  const T* data;
  int64_t time, channel;
  int count;
  PackDimension packs;
};

// The packs of successive steps; kAlongTime tells that the input has packs of steps.
template <class T, bool kAlongTime>
struct StepsInOrder {
  __device__ StepsInOrder(const ChannelsInput<T>& input, int64_t first) : input(input) {
    if constexpr (kAlongTime) {
      const int passed = int(first % kPack);
      if (passed == 0) return;
      load(first - passed);
      for (int i = 0; i < passed; ++i) next();
    }
  }

  // That of step `time`, which comes after the one given before.
  __device__ __forceinline__ Pack<T> at(int64_t time) {
    if constexpr (!kAlongTime) return input.load(time);
    if (time % kPack == 0) load(time);
    return next();
  }

 private:
  __device__ __forceinline__ void load(int64_t time) {
    load_along_time<T>(input.data + time, not_hoisted(input.channel), input.count, ahead);
  }

  __device__ __forceinline__ Pack<T> next() {
    const Pack<T> first = ahead[0];
#pragma unroll
    for (int i = 0; i + 1 < kPack; ++i) ahead[i] = ahead[i + 1];
    return first;
  }

  const ChannelsInput<T>& input;
  Pack<T> ahead[kPack] = {};
};

template <class T>
struct ChannelsOutput {
  __device__ ChannelsOutput(const OutputView& output, int64_t batch, int64_t channel, int count)
      : data(static_cast<T*>(output.data) + batch * output.batch + channel),
        time(output.time),
        count(count),
        packs(output.packs) {}

  __device__ __forceinline__ void store(int64_t step, const Pack<T>& pack) const {
    T* target = data + step * time;
    if (packs) {
      if (count > 0) pack.store(target);
    } else {
      const auto values = bit_cast<AlignedVector<T, kPack>>(pack);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        if (j < count) target[j] = values.values[j];
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
__device__ __forceinline__ void widen(const Pack<T>& pack, Accumulator<T> (&values)[kPack]) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    // From the words that hold two, which takes one instruction for each.
    const uint2 word = pack.word[0];
    values[0] = bit_cast<float>(word.x << 16);
    values[1] = bit_cast<float>(word.x & 0xffff0000u);
    values[2] = bit_cast<float>(word.y << 16);
    values[3] = bit_cast<float>(word.y & 0xffff0000u);
  } else {
    const auto each = bit_cast<AlignedVector<T, kPack>>(pack);
#pragma unroll
    for (int j = 0; j < kPack; ++j) values[j] = to_accumulator(each.values[j]);
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
__device__ __forceinline__ Pack<T> narrowed(const Accumulator<T> (&values)[kPack]) {
  if constexpr (sizeof(T) == 2) {
    return bit_cast<Pack<T>>(
        uint2{narrowed_pair<T>(values[0], values[1]), narrowed_pair<T>(values[2], values[3])});
  } else {
    return bit_cast<Pack<T>>(values);
  }
}

}  // namespace mambablock
