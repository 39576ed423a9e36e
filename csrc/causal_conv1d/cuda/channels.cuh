// SPDX-License-Identifier: Apache-2.0
//
// A thread takes neighbouring channels of one row of the batch through a chunk of time, and
// neighbouring threads take neighbouring ones; an access moves 16 bytes where memory is aligned.
// Steps are taken in groups, whose loads are all in flight before the first store. The last inputs
// stay in registers where d_conv is at most kCudaConvTaps (kTaps > 0); else they are loaded again
// for each step.
#pragma once

#include "causal_conv1d/cuda/kernels.h"
#include "common/cuda/packs.cuh"
#include "common/cuda/sequences.cuh"

namespace mambablock {

inline constexpr int kConvThreads = 128;
// Steps whose loads are in flight together.
inline constexpr int kConvGroup = 4;

// A thread's channels.
template <class T>
inline constexpr int kConvPack = 16 / sizeof(T);
template <class T>
using ConvPack = Pack<T, kConvPack<T>>;
template <class T>
struct Values {
  Accumulator<T> at[kConvPack<T>];
};

// The thread's channels of a (B, L, D) input. `count` is how many there are, 0 or less where none
// is.
template <class T>
struct ChannelsInput {
  __device__ ChannelsInput(const InputView& input, int64_t batch, int64_t channel, int count)
      : data(static_cast<const T*>(input.data) + batch * input.batch + channel * input.channel),
        time(input.time),
        channel(input.channel),
        count(count),
        along_time(input.packs == PackDimension::kSteps),
        aligned(input.packs == PackDimension::kChannels && count >= kConvPack<T> &&
                reinterpret_cast<uintptr_t>(data) % sizeof(ConvPack<T>) == 0 &&
                time * int64_t(sizeof(T)) % int64_t(sizeof(ConvPack<T>)) == 0) {}

  // 0 for channels that do not exist.
  __device__ __forceinline__ ConvPack<T> load(int64_t step) const {
    if (aligned) return load_aligned(step);
    const T* source = data + step * time;
    AlignedVector<T, kConvPack<T>> pack{};
    const int64_t stride = not_hoisted(channel);
#pragma unroll
    for (int j = 0; j < kConvPack<T>; ++j) {
      if (j < count) pack.values[j] = source[j * stride];
    }
    return bit_cast<ConvPack<T>>(pack);
  }

  __device__ __forceinline__ ConvPack<T> load_aligned(int64_t step) const {
    return ConvPack<T>::load(data + step * time);
  }

  // Of the steps from `first` on.
  template <bool kAligned>
  __device__ __forceinline__ void load_group(int64_t first,
                                             ConvPack<T> (&group)[kConvGroup]) const {
    if constexpr (kAligned) {
      const T* source = data + first * time;
#pragma unroll
      for (int i = 0; i < kConvGroup; ++i, source += time) group[i] = ConvPack<T>::load(source);
    } else if (along_time && first % kConvGroup == 0) {
      load_along_time<T>(data + first, not_hoisted(channel), count, group);
    } else {
#pragma unroll
      for (int i = 0; i < kConvGroup; ++i) group[i] = load(first + i);
    }
  }

  const T* data;
  int64_t time, channel;
  int count;
  bool along_time, aligned;
};

template <class T>
struct ChannelsOutput {
  __device__ ChannelsOutput(const OutputView& output, int64_t batch, int64_t channel, int count)
      : data(static_cast<T*>(output.data) + batch * output.batch + channel),
        time(output.time),
        count(count),
        aligned(output.packs && count >= kConvPack<T> &&
                reinterpret_cast<uintptr_t>(data) % sizeof(ConvPack<T>) == 0 &&
                time * int64_t(sizeof(T)) % int64_t(sizeof(ConvPack<T>)) == 0) {}

  __device__ __forceinline__ void store(int64_t step, const ConvPack<T>& pack) const {
    T* target = data + step * time;
    if (aligned) return pack.store(target);
    const auto values = bit_cast<AlignedVector<T, kConvPack<T>>>(pack);
#pragma unroll
    for (int j = 0; j < kConvPack<T>; ++j) {
      if (j < count) target[j] = values.values[j];
    }
  }

  template <bool kAligned>
  __device__ __forceinline__ void store_group(int64_t first,
                                              const ConvPack<T> (&group)[kConvGroup]) const {
    if constexpr (kAligned) {
      T* target = data + first * time;
#pragma unroll
      for (int i = 0; i < kConvGroup; ++i, target += time) group[i].store(target);
    } else {
#pragma unroll
      for (int i = 0; i < kConvGroup; ++i) store(first + i, group[i]);
    }
  }

  T* data;
  int64_t time;
  int count;
  bool aligned;
};

template <class T, int kTaps>
struct Channels {
  using A = Accumulator<T>;
  static constexpr int pack = kConvPack<T>;

  __device__ Channels(const CausalConv1dInputs& p, const ConvCudaPlan& plan)
      : p(p), plan(plan), sequences{plan.boundaries, p.sequences, p.length, plan.reverse} {
    const int64_t packs = (p.channels + pack - 1) / pack;
    int64_t index = int64_t(blockIdx.x) * kConvThreads + threadIdx.x;
    channel = index % packs * pack;
    index /= packs;
    partial = index;
    const int64_t chunk = index % plan.chunks;
    batch = index / plan.chunks;
    exists = batch < p.batch;
    const int64_t rest = p.channels - channel;
    count = rest < pack ? int(rest) : pack;
    begin = chunk * plan.chunk_steps;
    end = begin + plan.chunk_steps < p.length ? begin + plan.chunk_steps : p.length;
  }

  __device__ int64_t width() const { return p.width; }

  // Of kTaps taps, the last are those of the weight; this many before them are not used.
  __device__ int unused_taps() const { return kTaps - int(p.width); }

  // Row `row` of a contiguous (rows, D) tensor; 0 where it is null.
  __device__ Values<T> load_row(const void* data, int64_t row) const {
    return load(data, row * p.channels, 1);
  }
  __device__ void store_row(void* data, int64_t row, const Values<T>& values) const {
    store(data, row * p.channels, 1, values);
  }

  // Column `tap` of one (D, W) matrix of a contiguous (matrices, D, W) tensor.
  __device__ Values<T> load_tap(const void* data, int64_t matrix, int64_t tap) const {
    return load(data, matrix * p.channels * width() + tap, width());
  }
  __device__ void store_tap(void* data, int64_t matrix, int64_t tap,
                            const Values<T>& values) const {
    store(data, matrix * p.channels * width() + tap, width(), values);
  }

  __device__ Values<T> load_bias() const { return load_parameter(p.bias, 0, 1); }
  __device__ Values<T> load_tap(int64_t tap) const {
    return load_parameter(p.weight, tap, width());
  }

  // The weight's taps.
  __device__ void load_taps(Values<T> (&weight)[kTaps > 0 ? kTaps : 1]) const {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      const int unused = unused_taps();
      weight[tap] = tap < unused ? Values<T>{} : load_tap(tap - unused);
    }
  }

  // Row `row` of sequence s in a (B|S, W-1, D) state.
  __device__ int64_t state_row(int64_t s, int64_t row) const {
    return sequences.state_row(batch, s) * (width() - 1) + row;
  }

  // The input of sequence s at a time from W-1 steps before it on; 0 before those.
  __device__ Values<T> input_at(const ChannelsInput<T>& x, int64_t s, int64_t time) const {
    const int64_t before = sequences.begin(s) - time;
    if (before >= width()) return {};
    if (before > 0) return load_row(p.initial_state, state_row(s, width() - 1 - before));
    return widened(x.load(time));
  }

  __device__ __forceinline__ static Values<T> widened(const ConvPack<T>& pack) {
    Values<T> values;
    widen(pack, values.at);
    return values;
  }

  const CausalConv1dInputs& p;
  const ConvCudaPlan& plan;
  Sequences sequences;
  int64_t channel, batch, begin, end;
  int64_t partial;  // the chunk, counted through the whole batch
  int count;
  bool exists;

 private:
  // Of these channels, given where channel 0 is and how far apart two are.
  __device__ Values<T> load(const void* data, int64_t first, int64_t stride) const {
    Values<T> values{};
    if (data == nullptr) return values;
    const A* source = static_cast<const A*>(data) + first + channel * stride;
#pragma unroll
    for (int j = 0; j < pack; ++j) {
      if (j < count) values.at[j] = source[j * stride];
    }
    return values;
  }

  __device__ Values<T> load_parameter(const ParameterView& parameter, int64_t first,
                                      int64_t stride) const {
    Values<T> values{};
    if (parameter.data == nullptr) return values;
#pragma unroll
    for (int j = 0; j < pack; ++j) {
      if (j < count) values.at[j] = parameter_at<T>(parameter, first + (channel + j) * stride);
    }
    return values;
  }

  __device__ void store(void* data, int64_t first, int64_t stride, const Values<T>& values) const {
    A* target = static_cast<A*>(data) + first + channel * stride;
#pragma unroll
    for (int j = 0; j < pack; ++j) {
      if (j < count) target[j * stride] = values.at[j];
    }
  }
};

// sum += weight * x
template <class T>
__device__ __forceinline__ void add_product(Values<T>& sum, const Values<T>& weight,
                                            const Values<T>& x) {
#pragma unroll
  for (int j = 0; j < kConvPack<T>; ++j) sum.at[j] += weight.at[j] * x.at[j];
}

// The last kSize values of a series, the latest last.
template <class T, int kSize>
struct Window {
  __device__ __forceinline__ void push(const Values<T>& next) {
#pragma unroll
    for (int i = 0; i + 1 < kSize; ++i) values[i] = values[i + 1];
    values[kSize - 1] = next;
  }

  Values<T> values[kSize];
};

// sum += the products of the taps that are used with the last inputs: not the others' by 0, which
// would let a NaN through.
template <class T, int kTaps>
__device__ __forceinline__ void add_products(Values<T>& sum, const Values<T> (&weight)[kTaps],
                                             const Window<T, kTaps>& inputs, int unused) {
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    if (tap >= unused) add_product(sum, weight[tap], inputs.values[tap]);
  }
}

inline int64_t conv_blocks(const CausalConv1dInputs& p, const ConvCudaPlan& plan, int pack) {
  const int64_t threads = p.batch * plan.chunks * ((p.channels + pack - 1) / pack);
  return (threads + kConvThreads - 1) / kConvThreads;
}

}  // namespace mambablock
