// SPDX-License-Identifier: Apache-2.0
//
// A thread's neighbouring channels of (B, L, D) tensors, moved at once where memory allows it.
#pragma once

#include "device.cuh"

namespace mambablock {

inline constexpr int kChannelPack = 4;

template <class T>
using ChannelPack = Pack<T, kChannelPack>;

// Whether a pack may be moved at once from `data` and from multiples of `stride` on.
template <class T>
__device__ __forceinline__ bool movable_in_packs(const T* data, int64_t stride) {
  constexpr int64_t size = alignof(ChannelPack<T>);
  return reinterpret_cast<uintptr_t>(data) % size == 0 && stride * int64_t(sizeof(T)) % size == 0;
}

// `count` is how many channels there are from `channel` on: any number, 0 and less too.
template <class T>
struct PackInput {
  __device__ PackInput(const Strided3& input, int64_t batch, int64_t channel, int count)
      : data(static_cast<const T*>(input.data) + batch * input.batch + channel * input.channel),
        time(input.time),
        channel(input.channel),
        count(count),
        packs(input.channel == 1 && count >= kChannelPack && movable_in_packs(data, time)) {}

  // 0 where the step does not exist, and for channels that do not.
  __device__ __forceinline__ ChannelPack<T> load(int64_t step, bool exists = true) const {
    ChannelPack<T> pack{};
    const T* source = data + step * time;
    if (exists && packs) {
      pack = *reinterpret_cast<const ChannelPack<T>*>(source);
    } else if (exists) {
#pragma unroll
      for (int j = 0; j < kChannelPack; ++j) {
        if (j < count) pack.values[j] = source[j * channel];
      }
    }
    return pack;
  }

  const T* data;
  int64_t time, channel;
  int count;
  bool packs;
};

template <class T>
struct PackOutput {
  __device__ PackOutput(const Strided3Out& output, int64_t batch, int64_t channel, int count)
      : data(static_cast<T*>(output.data) + batch * output.batch + channel),
        time(output.time),
        count(count),
        packs(count >= kChannelPack && movable_in_packs<T>(data, time)) {}

  __device__ __forceinline__ void store(int64_t step, const ChannelPack<T>& pack) const {
    T* target = data + step * time;
    if (packs) {
      *reinterpret_cast<ChannelPack<T>*>(target) = pack;
    } else {
#pragma unroll
      for (int j = 0; j < kChannelPack; ++j) {
        if (j < count) target[j] = pack.values[j];
      }
    }
  }

  T* data;
  int64_t time;
  int count;
  bool packs;
};

}  // namespace mambablock
