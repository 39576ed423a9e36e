// SPDX-License-Identifier: Apache-2.0
//
// A thread takes a pack of channels of one row of the batch through a chunk of time; neighbouring
// threads take neighbouring packs. Where d_conv is known when compiling (kWidth > 0) the last
// d_conv inputs stay in registers; else they are loaded again for each step.
#pragma once

#include "causal_conv1d/cuda/kernels.h"
#include "common/cuda/packs.cuh"
#include "common/cuda/sequences.cuh"

namespace mambablock {

inline constexpr int kConvThreads = 128;
// Blocks that a multiprocessor should have room for, to hide the time that memory takes.
template <class T>
inline constexpr int kConvBlocks = sizeof(T) == 8 ? 1 : 3;

// A pack of accumulators.
template <class A>
struct Values {
  A at[kPack];
};

template <class T, int kWidth>
struct Channels {
  using A = Accumulator<T>;

  __device__ Channels(const CausalConv1dInputs& p, const ConvCudaPlan& plan)
      : p(p), sequences{plan.boundaries, p.sequences, p.length, plan.reverse} {
    const int64_t packs = (p.channels + kPack - 1) / kPack;
    const int64_t chunks = cuda_conv_chunks(p);
    int64_t index = int64_t(blockIdx.x) * kConvThreads + threadIdx.x;
    channel = index % packs * kPack;
    index /= packs;
    partial = index;
    const int64_t chunk = index % chunks;
    batch = index / chunks;
    exists = batch < p.batch;
    const int64_t rest = p.channels - channel;
    count = rest < kPack ? int(rest) : kPack;
    begin = chunk * kCudaConvChunk;
    end = begin + kCudaConvChunk < p.length ? begin + kCudaConvChunk : p.length;
  }

  __device__ int64_t width() const { return kWidth > 0 ? kWidth : p.width; }

  // Row `row` of a contiguous (rows, D) tensor; 0 where it is null.
  __device__ Values<A> load_row(const void* data, int64_t row) const {
    return load(data, row * p.channels, 1);
  }
  __device__ void store_row(void* data, int64_t row, const Values<A>& values) const {
    store(data, row * p.channels, 1, values);
  }

  // Column `tap` of one (D, W) matrix of a contiguous (matrices, D, W) tensor; 0 where it is null.
  __device__ Values<A> load_tap(const void* data, int64_t matrix, int64_t tap) const {
    return load(data, matrix * p.channels * width() + tap, width());
  }
  __device__ void store_tap(void* data, int64_t matrix, int64_t tap,
                            const Values<A>& values) const {
    store(data, matrix * p.channels * width() + tap, width(), values);
  }

  // Row `row` of sequence s in a (B|S, W-1, D) state.
  __device__ int64_t state_row(int64_t s, int64_t row) const {
    return sequences.state_row(batch, s) * (width() - 1) + row;
  }

  // The input of sequence s at a time from W-1 steps before it on.
  __device__ Values<A> input_at(const ChannelsInput<T>& x, int64_t s, int64_t time) const {
    const int64_t before = sequences.begin(s) - time;
    if (before > 0) return load_row(p.initial_state, state_row(s, width() - 1 - before));
    return widened(x.load(time));
  }

  __device__ static Values<A> widened(const Pack<T>& pack) {
    Values<A> values;
    widen(pack, values.at);
    return values;
  }

  const CausalConv1dInputs& p;
  Sequences sequences;
  int64_t channel, batch, begin, end;
  int64_t partial;  // the chunk, counted through the whole batch
  int count;
  bool exists;

 private:
  // Of these channels, given where channel 0 is and how far apart two are.
  __device__ Values<A> load(const void* data, int64_t first, int64_t stride) const {
    Values<A> values{};
    if (data == nullptr) return values;
    const A* source = static_cast<const A*>(data) + first + channel * stride;
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      if (j < count) values.at[j] = source[j * stride];
    }
    return values;
  }

  __device__ void store(void* data, int64_t first, int64_t stride, const Values<A>& values) const {
    A* target = static_cast<A*>(data) + first + channel * stride;
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      if (j < count) target[j * stride] = values.at[j];
    }
  }
};

// Whether packs of steps are read; float64 would take too many registers.
template <class T, int kWidth>
__device__ __forceinline__ bool goes_along_time(const InputView& input) {
  return kWidth > 0 && sizeof(T) < 8 && input.packs == PackDimension::kSteps;
}

// Several, so that their loads are in flight together; packs of steps are that already.
template <bool kAlongTime>
inline constexpr int kUnrolledSteps = kAlongTime ? 1 : 4;

// sum += weight * x
template <class A>
__device__ __forceinline__ void add_product(Values<A>& sum, const Values<A>& weight,
                                            const Values<A>& x) {
#pragma unroll
  for (int j = 0; j < kPack; ++j) sum.at[j] += weight.at[j] * x.at[j];
}

// The last kSize packs of a series, the latest last.
template <class A, int kSize>
struct Window {
  __device__ __forceinline__ void push(const Values<A>& next) {
#pragma unroll
    for (int i = 0; i + 1 < kSize; ++i) packs[i] = packs[i + 1];
    packs[kSize - 1] = next;
  }

  Values<A> packs[kSize];
};

inline int64_t conv_threads(const CausalConv1dInputs& p) {
  return p.batch * cuda_conv_chunks(p) * ((p.channels + kPack - 1) / kPack);
}

}  // namespace mambablock
