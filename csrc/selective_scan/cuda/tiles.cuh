// SPDX-License-Identifier: Apache-2.0
//
// A block takes a block of channels of one row of the batch through a chunk of time, one tile of
// kCudaTile steps after the other. Inputs come into shared memory as accumulators.
//
// Two neighbouring threads share two neighbouring channels: each holds half of the states of both.
// Thus B and C are loaded once for two channels, and what is known of both channels comes at once.
#pragma once

#include "common/cuda/packs.cuh"
#include "common/cuda/sequences.cuh"
#include "selective_scan/cuda/kernels.h"

namespace mambablock {

// Steps of a tile whose same channels one thread moves, and the threads that share those channels.
inline constexpr int kRowsPerThread = 4;
inline constexpr int kRowThreads = kCudaTile / kRowsPerThread;

// States of each of its two channels that a thread holds.
template <class A>
inline constexpr int kStatesHeld = sizeof(A) == 8 ? 2 : 8;
template <class A>
inline constexpr int kStatesAtOnce = 2 * kStatesHeld<A>;

// Where a block is in the grid, and the thread in the block. In the recurrence a thread has
// channels [pair, pair + 2), and sums for channel `own`, which is one of them; in moving tiles it
// is the row_thread-th that has channels [column, column + 4), and has the rows from row_of(0) on.
template <class T, int Channels>
struct Block {
  using A = Accumulator<T>;

  __device__ explicit Block(const SelectiveScanParams& p)
      : p(p),
        own(threadIdx.x),
        half(threadIdx.x & 1),
        pair(own - half),
        row_thread(threadIdx.x / (Channels / kPack)),
        column(threadIdx.x % (Channels / kPack) * kPack) {
    const int64_t per_group = p.group_channels;
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
    even = per_group % 2 == 0;
    channels = rest < Channels ? int(rest) : Channels;
    begin = chunk * p.chunk_tiles * kCudaTile;
    end = begin + p.chunk_tiles * kCudaTile;
    if (end > p.length) end = p.length;
    sequences = {p.boundaries, p.sequences, p.length, p.reverse};
  }

  // The k-th row of a tile that the thread moves.
  __device__ int row_of(int k) const { return row_thread * kRowsPerThread + k; }

  // A (rows, D) or (rows, D, N) tensor's values at the block's first channel.
  __device__ A* channel_row(void* data, int64_t row, int64_t size = 1) const {
    return static_cast<A*>(data) + (row * p.channels + used_here(channel)) * size;
  }

  __device__ A parameter(const void* data, int c) const {
    return data != nullptr && c < channels ? static_cast<const A*>(data)[channel + c] : A(0);
  }

  const SelectiveScanParams& p;
  Sequences sequences;
  int own, half, pair, row_thread, column;
  int64_t batch, chunk, group, index_in_group;
  int64_t channel;  // of the block's first
  int channels;
  bool even;           // all pairs of channels are at even ones
  int64_t begin, end;  // of the chunk
};

__device__ __forceinline__ int steps_from(int64_t begin, int64_t end) {
  return end - begin < kCudaTile ? int(end - begin) : kCudaTile;
}

// Calls function(first) for each group of states that a block holds at once; one is a frequent
// case.
template <bool kOneGroup, class A, class F>
__device__ __forceinline__ void each_group(int64_t d_state, F function) {
  if constexpr (kOneGroup) {
    function(int64_t(0));
  } else {
    for (int64_t first = 0; first < d_state; first += kStatesAtOnce<A>) function(first);
  }
}

// Steps that loops over a tile do at once; float64 takes many registers.
template <class A>
inline constexpr int kUnrolled = sizeof(A) == 8 ? 1 : 8;

// Calls function(step) for all steps of a tile, in a loop that the compiler knows all of, and
// unrolls.
template <int kUnroll, class F>
__device__ __forceinline__ void each_step(F function) {
#pragma unroll kUnroll
  for (int step = 0; step < kCudaTile; ++step) function(step);
}

// The rows that a thread moves of a tile of a (B, L, D) tensor.
template <class T, class Pointer>
struct TileRows {
  template <int Channels>
  __device__ TileRows(const Block<T, Channels>& block, Pointer tensor, int64_t batch, int64_t time,
                      int64_t channel, int64_t begin)
      : row(block.row_of(0)),
        count(block.channels - block.column),
        time(time),
        channel(channel),
        place(tensor + block.batch * batch + (begin + row) * time +
              (block.channel + block.column) * channel) {}

  // To the tile that begins so many steps later.
  __device__ __forceinline__ void move(int64_t steps) { place += steps * time; }

  // Calls function(k, place) for `kRows` rows from the first-th on.
  template <int kRows, class F>
  __device__ __forceinline__ void each(int first, int64_t spacing, F function) const {
    Pointer at = place;
    if (kRows < kRowsPerThread) at += used_here(spacing) * first;
#pragma unroll
    for (int k = 0; k < kRows; ++k, at += spacing) function(k, at);
  }

  __device__ __forceinline__ bool exists(int k, int steps) const { return row + k < steps; }

  int row, count;
  int64_t time, channel;
  Pointer place;
};

template <class T>
struct TileInput : TileRows<T, const T*> {
  template <int Channels>
  __device__ TileInput(const Block<T, Channels>& block, const Strided3& input, int64_t begin)
      : TileRows<T, const T*>(block, static_cast<const T*>(input.data), input.batch, input.time,
                              input.channel, begin),
        input(input) {}

  __device__ __forceinline__ bool in_packs() const { return input.packs == Packs::kChannels; }

  // Rows from the first-th on. kWhole tells that the tile has all steps and comes in packs. Rows of
  // channels that do not exist must be 0 before.
  template <bool kWhole, int kRows>
  __device__ __forceinline__ void load(int steps, int first, ChannelPack<T> (&rows)[kRows]) const {
    if constexpr (kWhole) {
      load_packs(this->time, first, rows);
    } else if (steps == kCudaTile && in_packs()) {
      load_packs(used_here(this->time), first, rows);
    } else if (steps == kCudaTile && input.packs == Packs::kSteps) {
      load_along_time<T>(this->place + first, used_here(this->channel), this->count, rows);
    } else {
      const int64_t stride = used_here(this->channel);
      this->template each<kRows>(first, used_here(this->time), [&](int k, const T* source) {
        PackValues<T> pack{};
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (this->exists(first + k, steps) && j < this->count) {
            pack.values[j] = source[j * stride];
          }
        }
        rows[k] = bit_cast<ChannelPack<T>>(pack);
      });
    }
  }

 private:
  template <int kRows>
  __device__ __forceinline__ void load_packs(int64_t time, int first,
                                             ChannelPack<T> (&rows)[kRows]) const {
    this->template each<kRows>(first, time, [&](int k, const T* source) {
      if (this->count > 0) rows[k] = ChannelPack<T>::load(source);
    });
  }

  const Strided3& input;
};

template <class T>
struct TileOutput : TileRows<T, T*> {
  template <int Channels>
  __device__ TileOutput(const Block<T, Channels>& block, const Strided3Out& output, int64_t begin)
      : TileRows<T, T*>(block, static_cast<T*>(output.data), output.batch, output.time, 1, begin) {}

  template <bool kWhole, int kRows>
  __device__ __forceinline__ void store(int steps, int first,
                                        const ChannelPack<T> (&rows)[kRows]) const {
    if constexpr (kWhole) {
      this->template each<kRows>(first, this->time, [&](int k, T* target) {
        if (this->count > 0) rows[k].store(target);
      });
    } else {
      this->template each<kRows>(first, used_here(this->time), [&](int k, T* target) {
        const auto pack = bit_cast<PackValues<T>>(rows[k]);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (this->exists(first + k, steps) && j < this->count) target[j] = pack.values[j];
        }
      });
    }
  }
};

// B or C of the block's group, a tile at a time; a thread moves the same states of some steps.
template <class T, int Channels>
struct StatesInput {
  static constexpr int states = kStatesAtOnce<Accumulator<T>>;
  static constexpr int packs_per_step = states / kPack;
  static constexpr int steps_at_once = Channels / packs_per_step;
  static constexpr int rounds = (kCudaTile + steps_at_once - 1) / steps_at_once;

  __device__ StatesInput(const Block<T, Channels>& block, const Strided4& input, int64_t begin)
      : time(input.time),
        stride(input.state),
        d_state(block.p.d_state),
        step(threadIdx.x / packs_per_step),
        state(threadIdx.x % packs_per_step * kPack),
        data(static_cast<const T*>(input.data) + block.batch * input.batch +
             block.group * input.group + (begin + step) * time + state * stride) {}

  // To the tile that begins so many steps later.
  __device__ __forceinline__ void move(int64_t steps) { data += steps * time; }

  // States [first, first + kStatesAtOnce) of a tile's steps; kWhole as above. Those that do not
  // exist must be 0 before.
  template <bool kWhole>
  __device__ __forceinline__ void load(int steps, int64_t first,
                                       ChannelPack<T> (&loaded)[rounds]) const {
    const T* source = data;
    if (first > 0) source += first * stride;
    if constexpr (kWhole) {
#pragma unroll
      for (int round = 0; round < rounds; ++round, source += steps_at_once * time) {
        const bool exists = steps_at_once <= kCudaTile || step < kCudaTile;
        if (exists && first + state < d_state) loaded[round] = ChannelPack<T>::load(source);
      }
    } else {
      const int64_t exist = used_here(d_state) - first - state, next = used_here(stride);
#pragma unroll
      for (int round = 0; round < rounds; ++round, source += steps_at_once * time) {
        PackValues<T> values{};
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (step + round * steps_at_once < steps && j < exist) {
            values.values[j] = source[j * next];
          }
        }
        loaded[round] = bit_cast<ChannelPack<T>>(values);
      }
    }
  }

  // Into shared memory: [step][state].
  __device__ __forceinline__ void put(const ChannelPack<T> (&loaded)[rounds],
                                      Accumulator<T>* tile) const {
#pragma unroll
    for (int round = 0; round < rounds; ++round) {
      const int at = step + round * steps_at_once;
      if (steps_at_once > kCudaTile && at >= kCudaTile) break;
      Accumulator<T> values[kPack];
      widen(loaded[round], values);
      store_quads(values, tile + at * states + state);
    }
  }

  int64_t time, stride, d_state;
  int step, state;
  const T* data;
};

}  // namespace mambablock
