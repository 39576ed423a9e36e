// SPDX-License-Identifier: Apache-2.0
//
// A block takes some channels of one row of the batch through a chunk of time, one tile of steps
// after the other. Inputs are loaded into shared memory as accumulators.
//
// Four neighbouring threads share two neighbouring channels: each holds a quarter of the states of
// both. Thus a step's B and C are loaded once for two channels, what both channels need by one
// access, and the sums over two channels take no access at all.
#pragma once

#include "common/cuda/packs.cuh"
#include "common/cuda/sequences.cuh"
#include "selective_scan/cuda/kernels.h"

namespace mambablock {

// The threads that share two channels.
inline constexpr int kParts = 4;

// States of each of its two channels that a thread holds: an access of shared memory.
template <class A>
inline constexpr int kStatesHeld = 16 / sizeof(A);
template <class A>
inline constexpr int kStatesAtOnce = kParts * kStatesHeld<A>;

// The block's place in the grid, and the thread's in the block. In the recurrence a thread has
// channels [pair, pair + 2) and the part-th quarter of their states; in loads and stores of tiles,
// which are by RowThreads threads, it has channels [column, column + 4) of the rows from row_of(0)
// on.
template <class T, int Channels, int Tile, int RowThreads = Channels * kParts / 2>
struct Block {
  using Activation = T;
  using A = Accumulator<T>;
  static constexpr int channels_at_once = Channels, tile = Tile;
  static constexpr int threads = Channels * kParts / 2, row_threads = RowThreads;
  static constexpr int rows = Tile * (Channels / kPack) / RowThreads;  // of a thread

  __device__ Block(const SelectiveScanInputs& p, const ScanCudaPlan& plan)
      : p(p),
        plan(plan),
        rank(threadIdx.x % RowThreads),
        part(threadIdx.x % kParts),
        pair(threadIdx.x % threads / kParts * 2),
        row(rank / (Channels / kPack) * rows),
        column(rank % (Channels / kPack) * kPack) {
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
    begin = chunk * plan.chunk_steps;
    end = begin + plan.chunk_steps;
    if (end > p.length) end = p.length;
    sequences = {plan.boundaries, p.sequences, p.length, plan.reverse};
  }

  // Whether all channels exist, in pairs at even ones, and all states, those of one slice.
  __device__ bool is_full() const {
    return channels == Channels && even && p.d_state == kStatesAtOnce<A>;
  }

  // The chunk, counted through the whole batch.
  __device__ int64_t chunk_row() const { return batch * plan.chunks + chunk; }

  // The k-th row of a tile that the thread loads or stores.
  __device__ int row_of(int k) const { return row + k; }

  __device__ int steps_from(int64_t time) const {
    return end - time < Tile ? int(end - time) : Tile;
  }

  // A (rows, D) or (rows, D, N) tensor's values at the block's first channel.
  __device__ A* channel_row(void* data, int64_t row, int64_t size = 1) const {
    return static_cast<A*>(data) + channel_offset(row, size);
  }
  __device__ const A* channel_row(const void* data, int64_t row, int64_t size = 1) const {
    return static_cast<const A*>(data) + channel_offset(row, size);
  }

  __device__ A parameter(const ParameterView& parameter, int c) const {
    return parameter.data != nullptr && c < channels ? parameter_at<T>(parameter, channel + c)
                                                     : A(0);
  }

  const SelectiveScanInputs& p;
  const ScanCudaPlan& plan;
  Sequences sequences;
  int rank;  // of the thread among those that load and store tiles
  int part, pair, row, column;
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

// data + offset; an empty tensor's data is null, which C++ lets nobody add to, and a device does.
template <class T>
__device__ __forceinline__ T* advanced(T* data, int64_t offset) {
#if !defined(__CUDA_ARCH__)
  if (data == nullptr) return data;
#endif
  return data + offset;
}

// The rows of a tile of a (B, L, D) tensor that a thread loads or stores.
template <class Block, class Pointer>
struct TileRows {
  static constexpr int rows = Block::rows;

  __device__ TileRows(const Block& block, Pointer tensor, int64_t batch, int64_t time,
                      int64_t channel, int64_t begin)
      : row(block.row),
        count(block.channels - block.column),
        time(time),
        channel(channel),
        place(advanced(tensor, block.batch * batch + (begin + row) * time +
                                   (block.channel + block.column) * channel)) {}

  // To the tile that begins so many steps later.
  __device__ __forceinline__ void move(int64_t steps) { place += steps * time; }

  // Calls function(k, place) for each row.
  template <class F>
  __device__ __forceinline__ void each(int64_t spacing, F function) const {
    Pointer at = place;
#pragma unroll
    for (int k = 0; k < rows; ++k, at += spacing) function(k, at);
  }

  __device__ __forceinline__ bool exists(int k, int steps) const { return row + k < steps; }

  int row, count;
  int64_t time, channel;
  Pointer place;
};

template <class T, class Block>
struct TileInput : TileRows<Block, const T*> {
  static constexpr int rows = Block::rows;

  __device__ TileInput(const Block& block, const InputView& input, int64_t begin)
      : TileRows<Block, const T*>(block, static_cast<const T*>(input.data), input.batch, input.time,
                                  input.channel, begin),
        input(input) {}

  __device__ __forceinline__ bool in_packs() const {
    return input.packs == PackDimension::kChannels;
  }

  // kRegular tells that the tile has all channels, in packs. Rows of channels that do not exist
  // must be 0 before.
  template <bool kRegular>
  __device__ __forceinline__ void load(int steps, Pack<T> (&loaded)[rows]) const {
    if constexpr (kRegular) {
      this->each(this->time, [&](int k, const T* source) {
        loaded[k] = this->exists(k, steps) ? Pack<T>::load(source) : Pack<T>{};
      });
    } else if (steps == Block::tile && in_packs()) {
      this->each(not_hoisted(this->time), [&](int k, const T* source) {
        if (this->count > 0) loaded[k] = Pack<T>::load(source);
      });
    } else if (rows > 1 && steps == Block::tile && input.packs == PackDimension::kSteps) {
      load_along_time<T>(this->place, not_hoisted(this->channel), this->count, loaded);
    } else {
      const int64_t stride = not_hoisted(this->channel);
      this->each(not_hoisted(this->time), [&](int k, const T* source) {
        AlignedVector<T, kPack> pack{};
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (this->exists(k, steps) && j < this->count) pack.values[j] = source[j * stride];
        }
        loaded[k] = bit_cast<Pack<T>>(pack);
      });
    }
  }

 private:
  const InputView& input;
};

template <class T, class Block>
struct TileOutput : TileRows<Block, T*> {
  static constexpr int rows = Block::rows;

  __device__ TileOutput(const Block& block, const OutputView& output, int64_t begin)
      : TileRows<Block, T*>(block, static_cast<T*>(output.data), output.batch, output.time, 1,
                            begin) {}

  template <bool kRegular>
  __device__ __forceinline__ void store(int steps, const Pack<T> (&packs)[rows]) const {
    if constexpr (kRegular) {
      this->each(this->time, [&](int k, T* target) {
        if (this->exists(k, steps)) packs[k].store(target);
      });
    } else {
      this->each(not_hoisted(this->time), [&](int k, T* target) {
        const auto pack = bit_cast<AlignedVector<T, kPack>>(packs[k]);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (this->exists(k, steps) && j < this->count) target[j] = pack.values[j];
        }
      });
    }
  }
};

// B or C of the block's group, a tile at a time; a thread loads the same states of some steps.
template <class T, class Block>
struct StatesInput {
  using A = Accumulator<T>;
  static constexpr int states = kStatesAtOnce<A>;
  static constexpr int packs_per_step = states / kPack;
  static constexpr int steps_at_once = Block::row_threads / packs_per_step;
  static constexpr int rounds = (Block::tile + steps_at_once - 1) / steps_at_once;

  __device__ StatesInput(const Block& block, const GroupedView& input, int64_t begin)
      : step(block.rank / packs_per_step),
        state(block.rank % packs_per_step * kPack),
        d_state(block.p.d_state),
        time(input.time),
        stride(input.state),
        data(advanced(static_cast<const T*>(input.data),
                      block.batch * input.batch + block.group * input.group +
                          (begin + step) * time + state * stride)) {}

  // To the tile that begins so many steps later.
  __device__ __forceinline__ void move(int64_t steps) { data += steps * time; }

  // States [first, first + kStatesAtOnce); kRegular tells that there are as many, in packs.
  template <bool kRegular>
  __device__ __forceinline__ void load(int steps, int64_t first, Pack<T> (&loaded)[rounds]) const {
    const T* source = data;
    if (first > 0) source += first * stride;
#pragma unroll
    for (int round = 0; round < rounds; ++round, source += steps_at_once * time) {
      loaded[round] = {};
      if (step + round * steps_at_once >= steps) continue;
      if constexpr (kRegular) {
        loaded[round] = Pack<T>::load(source);
      } else {
        const int64_t exist = not_hoisted(d_state) - first - state, next = not_hoisted(stride);
        AlignedVector<T, kPack> values{};
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (j < exist) values.values[j] = source[j * next];
        }
        loaded[round] = bit_cast<Pack<T>>(values);
      }
    }
  }

  // Into shared memory: [step][state].
  __device__ __forceinline__ void put(const Pack<T> (&loaded)[rounds], A* tile) const {
#pragma unroll
    for (int round = 0; round < rounds; ++round) {
      const int at = step + round * steps_at_once;
      if (rounds * steps_at_once > Block::tile && at >= Block::tile) continue;
      A values[kPack];
      widen(loaded[round], values);
      store_vectors(values, tile + at * states + state);
    }
  }

  int step, state;
  int64_t d_state, time, stride;
  const T* data;
};

}  // namespace mambablock
