// SPDX-License-Identifier: Apache-2.0
//
// A block takes a block of channels of one row of the batch through a chunk of time, one tile of
// kCudaTile steps after the other. Inputs come into shared memory as accumulators.
//
// Two neighbouring threads share two neighbouring channels: each holds half of the states of both,
// its own channel's first. Thus B and C are loaded once for two channels, and a sum over the states
// is one exchange with the neighbour, after which each thread has its own channel's.
#pragma once

#include "../common/packs.cuh"
#include "../common/sequences.cuh"
#include "cuda.h"

namespace mambablock {

// Steps of a tile whose same channels one thread moves.
inline constexpr int kRowsPerThread = 4;
inline constexpr int kRowSpacing = kCudaTile / kRowsPerThread;

// States of each of its two channels that a thread holds.
template <class A>
inline constexpr int kStatesHeld = sizeof(A) == 8 ? 2 : 8;
template <class A>
inline constexpr int kStatesAtOnce = 2 * kStatesHeld<A>;

// Where a block is in the grid, and the thread in the block. A thread is `own` in the recurrence;
// in moving tiles it is rows row, row + kRowSpacing, ... of channels [column, column + 4).
template <class T, int Channels>
struct Block {
  using A = Accumulator<T>;

  __device__ explicit Block(const SelectiveScanParams& p)
      : p(p),
        own(threadIdx.x),
        half(threadIdx.x & 1),
        row(threadIdx.x / (Channels / kChannelPack)),
        column(threadIdx.x % (Channels / kChannelPack) * kChannelPack) {
    const int64_t per_group = p.channels / p.groups;
    const int64_t in_group = (per_group + Channels - 1) / Channels;
    int64_t index = blockIdx.x;
    index_in_group = index % in_group;
    index /= in_group;
    group = index % p.groups;
    index /= p.groups;
    chunk = index % p.chunks;
    batch = index / p.chunks;
    const int64_t first = index_in_group * Channels, rest = per_group - first;
    channel = group * per_group + first;
    channels = rest < Channels ? int(rest) : Channels;
    begin = chunk * p.chunk_tiles * kCudaTile;
    end = begin + p.chunk_tiles * kCudaTile;
    if (end > p.length) end = p.length;
    sequences = {p.boundaries, p.sequences, p.length, p.reverse};
  }

  // The thread's k-th channel of the block: its own or its neighbour's.
  __device__ int channel_of(int k) const { return own ^ k; }

  // The k-th row of a tile that the thread moves.
  __device__ int row_of(int k) const { return row + k * kRowSpacing; }

  // A (rows, D) or (rows, D, N) tensor's values at the block's first channel.
  __device__ A* channel_row(void* data, int64_t row, int64_t size = 1) const {
    return static_cast<A*>(data) + (row * p.channels + channel) * size;
  }

  __device__ A parameter(const void* data, int c) const {
    return data != nullptr && c < channels ? static_cast<const A*>(data)[channel + c] : A(0);
  }

  const SelectiveScanParams& p;
  Sequences sequences;
  int own, half, row, column;
  int64_t batch, chunk, group, index_in_group;
  int64_t channel;  // of the block's first
  int channels;
  int64_t begin, end;  // of the chunk
};

__device__ __forceinline__ int steps_from(int64_t begin, int64_t end) {
  return end - begin < kCudaTile ? int(end - begin) : kCudaTile;
}

// Steps that loops over a tile do at once; float64 takes many registers.
template <class A>
inline constexpr int kUnrolled = sizeof(A) == 8 ? 1 : 4;

// Calls function(step) for steps [first, last) of a tile; those of a whole one in a loop that the
// compiler knows all of, and unrolls.
template <int kUnroll, class F>
__device__ __forceinline__ void each_step(int first, int last, F function) {
  if (last - first == kCudaTile) {
#pragma unroll kUnroll
    for (int step = 0; step < kCudaTile; ++step) function(step);
  } else {
#pragma unroll 1
    for (int step = first; step < last; ++step) function(step);
  }
}

// The thread's channels of a (B, L, D) tensor.
template <class T, int Channels>
__device__ __forceinline__ PackInput<T> pack_input(const Block<T, Channels>& block,
                                                   const Strided3& input) {
  return {input, block.batch, block.channel + block.column, block.channels - block.column,
          block.p.channels / block.p.groups};
}

template <class T, int Channels>
__device__ __forceinline__ PackOutput<T> pack_output(const Block<T, Channels>& block,
                                                     const Strided3Out& output) {
  return {output, block.batch, block.channel + block.column, block.channels - block.column,
          block.p.channels / block.p.groups};
}

// B or C of the block's group; a thread moves the same states of some steps.
template <class T, int Channels>
struct StatesInput {
  static constexpr int states = kStatesAtOnce<Accumulator<T>>;
  static constexpr int packs_per_step = states / kChannelPack;
  static constexpr int steps_at_once = Channels / packs_per_step;

  __device__ StatesInput(const Block<T, Channels>& block, const Strided4& input)
      : time(input.time),
        stride(input.state),
        d_state(block.p.d_state),
        step(threadIdx.x / packs_per_step),
        state(threadIdx.x % packs_per_step * kChannelPack),
        data(static_cast<const T*>(input.data) + block.batch * input.batch +
             block.group * input.group + step * time + state * stride),
        packs(input.group % kChannelPack == 0 &&
              movable_in_packs<T>(input.data, input.batch, time, stride, d_state)) {}

  // Brings in states [first, first + kStatesAtOnce) of a tile: [step][state]. 0 outside of `steps`
  // and N.
  __device__ __forceinline__ void load(int64_t begin, int steps, int64_t first,
                                       Accumulator<T>* tile) const {
    const T* source = data + begin * time + first * stride;
#pragma unroll
    for (int round = 0; round * steps_at_once < kCudaTile; ++round) {
      const int at = step + round * steps_at_once;
      if (steps_at_once > kCudaTile && at >= kCudaTile) break;
      ChannelPack<T> pack{};
      if (packs) {
        if (at < steps && first + state < d_state) pack = ChannelPack<T>::load(source);
      } else {
        PackValues<T> values{};
#pragma unroll
        for (int j = 0; j < kChannelPack; ++j) {
          if (at < steps && first + state + j < d_state) values.values[j] = source[j * stride];
        }
        pack = bit_cast<ChannelPack<T>>(values);
      }
      Accumulator<T> values[kChannelPack];
      widen(pack, values);
      store_quads(values, tile + at * states + state);
      source += steps_at_once * time;
    }
  }

  int64_t time, stride, d_state;
  int step, state;
  const T* data;
  bool packs;
};

// Pairs of values for neighbouring channels, such as dt and dt * u.
template <class A>
__device__ __forceinline__ void store_pairs(const A (&first)[kChannelPack],
                                            const A (&second)[kChannelPack], Pack<A, 2>* target) {
  A values[2 * kChannelPack];
#pragma unroll
  for (int j = 0; j < kChannelPack; ++j) {
    values[2 * j] = first[j];
    values[2 * j + 1] = second[j];
  }
  store_quads(values, target->values);
}

template <class A>
__device__ __forceinline__ void load_pairs(const Pack<A, 2>* source, A (&first)[kChannelPack],
                                           A (&second)[kChannelPack]) {
  A values[2 * kChannelPack];
  load_quads(source->values, values);
#pragma unroll
  for (int j = 0; j < kChannelPack; ++j) {
    first[j] = values[2 * j];
    second[j] = values[2 * j + 1];
  }
}

// dt of a row of delta, with the derivative by delta.
template <class A>
__device__ __forceinline__ Softplus<A> time_step(A delta, A bias, bool delta_softplus) {
  const A biased = delta + bias;
  return delta_softplus ? softplus_with_derivative(biased) : Softplus<A>{biased, A(1)};
}

// The thread's part of a (rows, D, N) tensor: states from `first` on of its two channels.
template <class A>
struct States {
  static constexpr int count = kStatesHeld<A>;

  template <class T, int Channels, class F>
  __device__ __forceinline__ void each(const Block<T, Channels>& block, int64_t first, F function) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int c = block.channel_of(k);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const int64_t n = first + block.half * count + i;
        function(values[k][i], c, n, c < block.channels && n < block.p.d_state);
      }
    }
  }

  // From the block's first channel of a row; 0 where it is null.
  template <class T, int Channels>
  __device__ __forceinline__ void load(const Block<T, Channels>& block, const A* row,
                                       int64_t first) {
    each(block, first, [&](A& value, int c, int64_t n, bool exists) {
      value = row != nullptr && exists ? row[c * block.p.d_state + n] : A(0);
    });
  }

  template <class T, int Channels>
  __device__ __forceinline__ void store(const Block<T, Channels>& block, A* row, int64_t first) {
    each(block, first, [&](A& value, int c, int64_t n, bool exists) {
      if (exists) row[c * block.p.d_state + n] = value;
    });
  }

  // Calls function(value, place, whether there is one) for the state on entering a tile, which is
  // kept as (B, tiles * N, D).
  template <class T, int Channels, class F>
  __device__ __forceinline__ void each_saved(const Block<T, Channels>& block, int64_t tile,
                                             int64_t first, F function) {
    const SelectiveScanParams& p = block.p;
    with_flag(first + 2 * count <= p.d_state, [&](auto all) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int c = block.channel_of(k);
        int64_t n = first + block.half * count;
        A* place =
            block.channel_row(p.saved_states, (block.batch * p.tiles + tile) * p.d_state + n) + c;
#pragma unroll
        for (int i = 0; i < count; ++i, ++n, place += p.channels) {
          function(values[k][i], place, c < block.channels && (all.value || n < p.d_state));
        }
      }
    });
  }

  template <class T, int Channels>
  __device__ __forceinline__ void load_saved(const Block<T, Channels>& block, int64_t tile,
                                             int64_t first) {
    each_saved(block, tile, first,
               [](A& value, const A* place, bool exists) { value = exists ? *place : A(0); });
  }

  template <class T, int Channels>
  __device__ __forceinline__ void save(const Block<T, Channels>& block, int64_t tile,
                                       int64_t first) {
    each_saved(block, tile, first, [](A value, A* place, bool exists) {
      if (exists) *place = value;
    });
  }

  A values[2][count];
};

// The row of a (B|S, D, N) state that belongs to sequence s; null stays null.
template <class T, int Channels>
__device__ __forceinline__ Accumulator<T>* sequence_row(const Block<T, Channels>& block,
                                                        const void* data, int64_t s) {
  if (data == nullptr) return nullptr;
  return block.channel_row(const_cast<void*>(data), block.sequences.state_row(block.batch, s),
                           block.p.d_state);
}

// The thread's part of A (D, N), with log2(e) in it, so that the decay is one exp2.
template <class T, int Channels>
__device__ __forceinline__ void load_A_log2e(const Block<T, Channels>& block, int64_t first,
                                             States<Accumulator<T>>& A_log2e) {
  A_log2e.load(block, block.channel_row(const_cast<void*>(block.p.A), 0, block.p.d_state), first);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    for (auto& value : A_log2e.values[k]) value *= Accumulator<T>(1.4426950408889634);
  }
}

// The sum over the states of the thread's own channel, given those over the states that it holds of
// its own channel and of its neighbour's.
template <class A>
__device__ __forceinline__ A sum_of_own(A own, A neighbours) {
  return own + __shfl_xor_sync(0xffffffff, neighbours, 1);
}

}  // namespace mambablock
