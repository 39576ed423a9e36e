// SPDX-License-Identifier: Apache-2.0
//
// A block takes some channels of one row of the batch through a chunk of time, one tile of
// kCudaTile steps after the other. Inputs are loaded into shared memory as accumulators.
//
// Two neighbouring threads share two neighbouring channels: each holds half of the states of both.
// Thus B and C are loaded once for two channels, and what both channels need by one access.
#pragma once

#include "common/cuda/packs.cuh"
#include "common/cuda/sequences.cuh"
#include "selective_scan/cuda/kernels.h"

namespace mambablock {

// Steps of a tile of which one thread loads the same channels, and the threads that share those.
inline constexpr int kRowsPerThread = 4;
inline constexpr int kRowThreads = kCudaTile / kRowsPerThread;

// States of each of its two channels that a thread holds.
template <class A>
inline constexpr int kStatesHeld = sizeof(A) == 8 ? 2 : 8;
template <class A>
inline constexpr int kStatesAtOnce = 2 * kStatesHeld<A>;

// The block's place in the grid, and the thread's in the block. In the recurrence a thread has
// channels [pair, pair + 2), and sums for channel `own`, which is one of them; in loads and stores
// of tiles it is the row_thread-th that has channels [column, column + 4), and has the rows from
// row_of(0) on.
template <class T, int Channels>
struct Block {
  using A = Accumulator<T>;

  __device__ Block(const SelectiveScanInputs& p, const ScanCudaPlan& plan)
      : p(p),
        plan(plan),
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
    chunk = index % plan.chunks;
    batch = index / plan.chunks;
    const int64_t first = index_in_group * Channels, rest = per_group - first;
    channel = group * per_group + first;
    even = per_group % 2 == 0;
    channels = rest < Channels ? int(rest) : Channels;
    begin = chunk * plan.chunk_tiles * kCudaTile;
    end = begin + plan.chunk_tiles * kCudaTile;
    if (end > p.length) end = p.length;
    sequences = {plan.boundaries, p.sequences, p.length, plan.reverse};
  }

  // The chunk, counted through the whole batch.
  __device__ int64_t chunk_row() const { return batch * plan.chunks + chunk; }

  // The k-th row of a tile that the thread loads or stores.
  __device__ int row_of(int k) const { return row_thread * kRowsPerThread + k; }

  // A (rows, D) or (rows, D, N) tensor's values at the block's first channel.
  __device__ A* channel_row(void* data, int64_t row, int64_t size = 1) const {
    return static_cast<A*>(data) + channel_offset(row, size);
  }
  __device__ const A* channel_row(const void* data, int64_t row, int64_t size = 1) const {
    return static_cast<const A*>(data) + channel_offset(row, size);
  }

  __device__ A parameter(const void* data, int c) const {
    return data != nullptr && c < channels ? static_cast<const A*>(data)[channel + c] : A(0);
  }

  const SelectiveScanInputs& p;
  const ScanCudaPlan& plan;
  Sequences sequences;
  int own, half, pair, row_thread, column;
  int64_t batch, chunk, group, index_in_group;
  int64_t channel;  // of the block's first
  int channels;
  bool even;           // all pairs of channels are at even ones
  int64_t begin, end;  // of the chunk

 private:
  __device__ int64_t channel_offset(int64_t row, int64_t size) const {
    return (row * p.channels + not_hoisted(channel)) * size;
  }
};

__device__ __forceinline__ int steps_from(int64_t begin, int64_t end) {
  return end - begin < kCudaTile ? int(end - begin) : kCudaTile;
}

// Calls function(first) for each slice of the states, as many as a block holds; one is a frequent
// case.
template <bool kOneSlice, class A, class F>
__device__ __forceinline__ void each_slice(int64_t d_state, F function) {
  if constexpr (kOneSlice) {
    function(int64_t(0));
  } else {
    for (int64_t first = 0; first < d_state; first += kStatesAtOnce<A>) function(first);
  }
}

// Steps for which loops over a tile are unrolled; float64 takes many registers.
template <class A>
inline constexpr int kUnrolled = sizeof(A) == 8 ? 1 : 8;

// Calls function(step) for all steps of a tile, in a loop whose length the compiler knows.
template <int kUnroll, class F>
__device__ __forceinline__ void each_step(F function) {
#pragma unroll kUnroll
  for (int step = 0; step < kCudaTile; ++step) function(step);
}

// The rows of a tile of a (B, L, D) tensor that a thread loads or stores.
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
    if (kRows < kRowsPerThread) at += not_hoisted(spacing) * first;
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
  __device__ TileInput(const Block<T, Channels>& block, const InputView& input, int64_t begin)
      : TileRows<T, const T*>(block, static_cast<const T*>(input.data), input.batch, input.time,
                              input.channel, begin),
        input(input) {}

  __device__ __forceinline__ bool in_packs() const {
    return input.packs == PackDimension::kChannels;
  }

  // Rows from the first-th on. kWhole tells that the tile has all steps and packs of channels. Rows
  // of channels that do not exist must be 0 before.
  template <bool kWhole, int kRows>
  __device__ __forceinline__ void load(int steps, int first, Pack<T> (&rows)[kRows]) const {
    if constexpr (kWhole) {
      load_packs(this->time, first, rows);
    } else if (steps == kCudaTile && in_packs()) {
      load_packs(not_hoisted(this->time), first, rows);
    } else if (steps == kCudaTile && input.packs == PackDimension::kSteps) {
      load_along_time<T>(this->place + first, not_hoisted(this->channel), this->count, rows);
    } else {
      const int64_t stride = not_hoisted(this->channel);
      this->template each<kRows>(first, not_hoisted(this->time), [&](int k, const T* source) {
        AlignedVector<T, kPack> pack{};
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (this->exists(first + k, steps) && j < this->count) {
            pack.values[j] = source[j * stride];
          }
        }
        rows[k] = bit_cast<Pack<T>>(pack);
      });
    }
  }

 private:
  template <int kRows>
  __device__ __forceinline__ void load_packs(int64_t time, int first,
                                             Pack<T> (&rows)[kRows]) const {
    this->template each<kRows>(first, time, [&](int k, const T* source) {
      if (this->count > 0) rows[k] = Pack<T>::load(source);
    });
  }

  const InputView& input;
};

template <class T>
struct TileOutput : TileRows<T, T*> {
  template <int Channels>
  __device__ TileOutput(const Block<T, Channels>& block, const OutputView& output, int64_t begin)
      : TileRows<T, T*>(block, static_cast<T*>(output.data), output.batch, output.time, 1, begin) {}

  template <bool kWhole, int kRows>
  __device__ __forceinline__ void store(int steps, int first, const Pack<T> (&rows)[kRows]) const {
    if constexpr (kWhole) {
      this->template each<kRows>(first, this->time, [&](int k, T* target) {
        if (this->count > 0) rows[k].store(target);
      });
    } else {
      this->template each<kRows>(first, not_hoisted(this->time), [&](int k, T* target) {
        const auto pack = bit_cast<AlignedVector<T, kPack>>(rows[k]);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (this->exists(first + k, steps) && j < this->count) target[j] = pack.values[j];
        }
      });
    }
  }
};

// B or C of the block's group, a tile at a time; a thread loads the same states of some steps.
template <class T, int Channels>
struct StatesInput {
  static constexpr int states = kStatesAtOnce<Accumulator<T>>;
  static constexpr int packs_per_step = states / kPack;
  static constexpr int steps_at_once = Channels / packs_per_step;
  static constexpr int rounds = (kCudaTile + steps_at_once - 1) / steps_at_once;

  __device__ StatesInput(const Block<T, Channels>& block, const GroupedView& input, int64_t begin)
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
  __device__ __forceinline__ void load(int steps, int64_t first, Pack<T> (&loaded)[rounds]) const {
    const T* source = data;
    if (first > 0) source += first * stride;
    if constexpr (kWhole) {
#pragma unroll
      for (int round = 0; round < rounds; ++round, source += steps_at_once * time) {
        const bool exists = steps_at_once <= kCudaTile || step < kCudaTile;
        if (exists && first + state < d_state) loaded[round] = Pack<T>::load(source);
      }
    } else {
      const int64_t exist = not_hoisted(d_state) - first - state, next = not_hoisted(stride);
#pragma unroll
      for (int round = 0; round < rounds; ++round, source += steps_at_once * time) {
        AlignedVector<T, kPack> values{};
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (step + round * steps_at_once < steps && j < exist) {
            values.values[j] = source[j * next];
          }
        }
        loaded[round] = bit_cast<Pack<T>>(values);
      }
    }
  }

  // Into shared memory: [step][state].
  __device__ __forceinline__ void put(const Pack<T> (&loaded)[rounds], Accumulator<T>* tile) const {
#pragma unroll
    for (int round = 0; round < rounds; ++round) {
      const int at = step + round * steps_at_once;
      if (steps_at_once > kCudaTile && at >= kCudaTile) break;
      Accumulator<T> values[kPack];
      widen(loaded[round], values);
      store_vectors(values, tile + at * states + state);
    }
  }

  int64_t time, stride, d_state;
  int step, state;
  const T* data;
};

}  // namespace mambablock
