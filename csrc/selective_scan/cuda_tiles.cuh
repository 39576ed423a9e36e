// SPDX-License-Identifier: Apache-2.0
//
// A block takes a block of channels of one row of the batch through a chunk of time, one tile of
// kCudaTile steps after the other. Inputs come into shared memory as accumulators.
//
// Two neighbouring threads share two neighbouring channels: each holds half of the states of both.
// Thus B and C are loaded once for two channels, and what is known of both channels comes at once.
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

// Where a block is in the grid, and the thread in the block. In the recurrence a thread has
// channels [pair, pair + 2), and sums for channel `own`, which is one of them; in moving tiles it
// has rows row, row + kRowSpacing, ... of channels [column, column + 4).
template <class T, int Channels>
struct Block {
  using A = Accumulator<T>;

  __device__ explicit Block(const SelectiveScanParams& p)
      : p(p),
        own(threadIdx.x),
        half(threadIdx.x & 1),
        pair(own - half),
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
    even = per_group % 2 == 0;
    channels = rest < Channels ? int(rest) : Channels;
    begin = chunk * p.chunk_tiles * kCudaTile;
    end = begin + p.chunk_tiles * kCudaTile;
    if (end > p.length) end = p.length;
    sequences = {p.boundaries, p.sequences, p.length, p.reverse};
  }

  // The k-th row of a tile that the thread moves.
  __device__ int row_of(int k) const { return row + k * kRowSpacing; }

  // A (rows, D) or (rows, D, N) tensor's values at the block's first channel.
  __device__ A* channel_row(void* data, int64_t row, int64_t size = 1) const {
    return static_cast<A*>(data) + (row * p.channels + used_here(channel)) * size;
  }

  __device__ A parameter(const void* data, int c) const {
    return data != nullptr && c < channels ? static_cast<const A*>(data)[channel + c] : A(0);
  }

  const SelectiveScanParams& p;
  Sequences sequences;
  int own, half, pair, row, column;
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

// The rows that a thread moves of the tiles of a (B, L, D) tensor, one after the other: forward, or
// backward with each tile's last one first.
template <class T, class Pointer, bool kBackward>
struct TileRows {
  template <int Channels>
  __device__ TileRows(const Block<T, Channels>& block, Pointer tensor, int64_t batch, int64_t time,
                      int64_t channel, int64_t begin)
      : packs(movable_in_packs<T>(tensor, batch, time, channel, block.p.channels / block.p.groups)),
        row(block.row),
        count(block.channels - block.column),
        time(time),
        channel(channel),
        place(tensor + block.batch * batch +
              (begin + block.row_of(kBackward ? kRowsPerThread - 1 : 0)) * time +
              (block.channel + block.column) * channel) {}

  // Calls function(k, place) for `kRows` rows from the first-th on, in that order.
  template <int kRows, class F>
  __device__ __forceinline__ void each(int64_t spacing, F function) {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      function(kBackward ? kRows - 1 - k : k, place);
      place += kBackward ? -spacing : spacing;
    }
  }

  __device__ __forceinline__ bool exists(int k, int steps) const {
    return row + k * kRowSpacing < steps;
  }

  bool packs;
  int row, count;
  int64_t time, channel;
  Pointer place;
};

template <class T, bool kBackward = false>
struct TileInput : TileRows<T, const T*, kBackward> {
  template <int Channels>
  __device__ TileInput(const Block<T, Channels>& block, const Strided3& input, int64_t begin)
      : TileRows<T, const T*, kBackward>(block, static_cast<const T*>(input.data), input.batch,
                                         input.time, input.channel, begin) {}

  // The next rows; the first of them is the tile's first-th. kWhole tells that the tile has all
  // steps and comes in packs. Rows of channels that do not exist must be 0 before.
  template <bool kWhole, int kRows>
  __device__ __forceinline__ void load(int steps, int first, ChannelPack<T> (&rows)[kRows]) {
    if constexpr (kWhole) {
      this->template each<kRows>(kRowSpacing * this->time, [&](int k, const T* source) {
        if (this->count > 0) rows[k] = ChannelPack<T>::load(source);
      });
    } else {
      const int64_t stride = used_here(this->channel);
      this->template each<kRows>(used_here(kRowSpacing * this->time), [&](int k, const T* source) {
        PackValues<T> pack{};
#pragma unroll
        for (int j = 0; j < kChannelPack; ++j) {
          if (this->exists(first + k, steps) && j < this->count) {
            pack.values[j] = source[j * stride];
          }
        }
        rows[k] = bit_cast<ChannelPack<T>>(pack);
      });
    }
  }
};

template <class T, bool kBackward = false>
struct TileOutput : TileRows<T, T*, kBackward> {
  template <int Channels>
  __device__ TileOutput(const Block<T, Channels>& block, const Strided3Out& output, int64_t begin)
      : TileRows<T, T*, kBackward>(block, static_cast<T*>(output.data), output.batch, output.time,
                                   1, begin) {}

  template <bool kWhole, int kRows>
  __device__ __forceinline__ void store(int steps, int first, const ChannelPack<T> (&rows)[kRows]) {
    if constexpr (kWhole) {
      this->template each<kRows>(kRowSpacing * this->time, [&](int k, T* target) {
        if (this->count > 0) rows[k].store(target);
      });
    } else {
      this->template each<kRows>(used_here(kRowSpacing * this->time), [&](int k, T* target) {
        const auto pack = bit_cast<PackValues<T>>(rows[k]);
#pragma unroll
        for (int j = 0; j < kChannelPack; ++j) {
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
  static constexpr int packs_per_step = states / kChannelPack;
  static constexpr int steps_at_once = Channels / packs_per_step;
  static constexpr int rounds = (kCudaTile + steps_at_once - 1) / steps_at_once;

  __device__ StatesInput(const Block<T, Channels>& block, const Strided4& input, int64_t begin)
      : time(input.time),
        stride(input.state),
        d_state(block.p.d_state),
        step(threadIdx.x / packs_per_step),
        state(threadIdx.x % packs_per_step * kChannelPack),
        data(static_cast<const T*>(input.data) + block.batch * input.batch +
             block.group * input.group + (begin + step) * time + state * stride),
        packs(input.group % kChannelPack == 0 &&
              movable_in_packs<T>(input.data, input.batch, time, stride, d_state)) {}

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
        for (int j = 0; j < kChannelPack; ++j) {
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
      Accumulator<T> values[kChannelPack];
      widen(loaded[round], values);
      store_quads(values, tile + at * states + state);
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
    const int64_t d_state = used_here(block.p.d_state);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int c = block.pair + k;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const int64_t n = first + block.half * count + i;
        function(values[k][i], c * d_state + n, c < block.channels && n < d_state);
      }
    }
  }

  // From the block's first channel of a row; 0 where it is null.
  template <class T, int Channels>
  __device__ __forceinline__ void load(const Block<T, Channels>& block, const A* row,
                                       int64_t first) {
    each(block, first, [&](A& value, int64_t at, bool exists) {
      value = row != nullptr && exists ? row[at] : A(0);
    });
  }

  template <class T, int Channels>
  __device__ __forceinline__ void store(const Block<T, Channels>& block, A* row, int64_t first) {
    each(block, first, [&](A& value, int64_t at, bool exists) {
      if (exists) row[at] = value;
    });
  }

  // Calls function(both channels' values, place, whether it exists) for each of the states on
  // entering a tile, given the first one's place. They are kept as (B, tiles * N, D).
  template <class T, int Channels, class F>
  __device__ __forceinline__ void each_saved(const Block<T, Channels>& block, A* place,
                                             int64_t first, F function) {
    const SelectiveScanParams& p = block.p;
    if (first > 0) place += first * p.channels;
    with_flag(first + 2 * count <= p.d_state, [&](auto all) {
      const int64_t exist = used_here(p.d_state) - first - block.half * count;
#pragma unroll
      for (int i = 0; i < count; ++i, place += p.channels) {
        function(values[0][i], values[1][i], place, all.value || i < exist);
      }
    });
  }

  // The first one's place of the tile at `begin`.
  template <class T, int Channels>
  __device__ static A* saved_place(const Block<T, Channels>& block, int64_t begin) {
    const SelectiveScanParams& p = block.p;
    const int64_t row = (block.batch * p.tiles + begin / kCudaTile) * p.d_state;
    return block.channel_row(p.saved_states, row + block.half * count) + block.pair;
  }

  template <class T, int Channels>
  __device__ __forceinline__ void load_saved(const Block<T, Channels>& block, A* place,
                                             int64_t first) {
    if (block.pair >= block.channels) {
      load(block, nullptr, first);
      return;
    }
    with_flag(block.even, [&](auto even) {
      each_saved(block, place, first, [&](A& low, A& high, const A* at, bool exists) {
        Pack<A, 2> pair{};
        if constexpr (even.value) {
          if (exists) pair = *reinterpret_cast<const Pack<A, 2>*>(at);
        } else if (exists) {
          pair.values[0] = at[0];
          if (block.pair + 1 < block.channels) pair.values[1] = at[1];
        }
        low = pair.values[0];
        high = pair.values[1];
      });
    });
  }

  template <class T, int Channels>
  __device__ __forceinline__ void save(const Block<T, Channels>& block, A* place, int64_t first) {
    if (block.pair >= block.channels) return;
    with_flag(block.even, [&](auto even) {
      each_saved(block, place, first, [&](A low, A high, A* at, bool exists) {
        if constexpr (even.value) {
          if (exists) *reinterpret_cast<Pack<A, 2>*>(at) = {low, high};
        } else if (exists) {
          at[0] = low;
          if (block.pair + 1 < block.channels) at[1] = high;
        }
      });
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

// What is summed over a half of the states: [step][channel]. The other half's are a quarter of the
// banks away, so that the two threads of a pair write theirs at once.
template <class Sum, int Channels>
struct alignas(16) HalfSums {
  Sum at[kCudaTile][Channels];
  Pack<float, 8> between;
};

// Adds the sums over the other half of the states.
template <class A, int Count>
__device__ __forceinline__ void add_quads(const A* source, A (&values)[Count]) {
  A others[Count];
  load_quads(source, others);
#pragma unroll
  for (int i = 0; i < Count; ++i) values[i] += others[i];
}

}  // namespace mambablock
