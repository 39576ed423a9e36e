// SPDX-License-Identifier: Apache-2.0
//
// A thread's part of the states, and of a tile in shared memory.
#pragma once

#include "selective_scan/cuda/tiles.cuh"

namespace mambablock {

// Pairs of values for neighbouring channels, such as dt and dt * u.
template <class A>
__device__ __forceinline__ void store_pairs(const A (&first)[kPack], const A (&second)[kPack],
                                            AlignedVector<A, 2>* target) {
  A values[2 * kPack];
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    values[2 * j] = first[j];
    values[2 * j + 1] = second[j];
  }
  store_vectors(values, target->values);
}

template <class A>
__device__ __forceinline__ void load_pairs(const AlignedVector<A, 2>* source, A (&first)[kPack],
                                           A (&second)[kPack]) {
  A values[2 * kPack];
  load_vectors(source->values, values);
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    first[j] = values[2 * j];
    second[j] = values[2 * j + 1];
  }
}

// dt, with its derivative by delta.
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
    const int64_t d_state = not_hoisted(block.p.d_state);
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
  // entering a tile, given the first one's place. They are saved as (B, tiles * N, D).
  template <class T, int Channels, class Pointer, class F>
  __device__ __forceinline__ void each_saved(const Block<T, Channels>& block, Pointer place,
                                             int64_t first, F function) {
    const SelectiveScanInputs& p = block.p;
    if (first > 0) place += first * p.channels;
    with_flag(first + 2 * count <= p.d_state, [&](auto all) {
      const int64_t exist = not_hoisted(p.d_state) - first - block.half * count;
#pragma unroll
      for (int i = 0; i < count; ++i, place += p.channels) {
        function(values[0][i], values[1][i], place, all.value || i < exist);
      }
    });
  }

  // The first one's place of the tile at `begin` in saved_states.
  template <class T, int Channels, class Pointer>
  __device__ static auto saved_place(const Block<T, Channels>& block, Pointer saved_states,
                                     int64_t begin) {
    const int64_t tile = block.batch * block.plan.tiles + begin / kCudaTile;
    const int64_t row = tile * block.p.d_state + block.half * count;
    return block.channel_row(saved_states, row) + block.pair;
  }

  template <class T, int Channels>
  __device__ __forceinline__ void load_saved(const Block<T, Channels>& block, const A* place,
                                             int64_t first) {
    if (block.pair >= block.channels) {
      load(block, nullptr, first);
      return;
    }
    with_flag(block.even, [&](auto even) {
      each_saved(block, place, first, [&](A& low, A& high, const A* at, bool exists) {
        AlignedVector<A, 2> pair{};
        if constexpr (even.value) {
          if (exists) pair = *reinterpret_cast<const AlignedVector<A, 2>*>(at);
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
          if (exists) *reinterpret_cast<AlignedVector<A, 2>*>(at) = {low, high};
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
template <class T, int Channels, class Pointer>
__device__ __forceinline__ auto sequence_row(const Block<T, Channels>& block, Pointer data,
                                             int64_t s) {
  using Row = decltype(block.channel_row(data, 0));
  if (data == nullptr) return Row(nullptr);
  return block.channel_row(data, block.sequences.state_row(block.batch, s), block.p.d_state);
}

// The thread's part of A (D, N), with log2(e) in it, so that the decay is one exp2.
template <class T, int Channels>
__device__ __forceinline__ void load_A_log2e(const Block<T, Channels>& block, int64_t first,
                                             States<Accumulator<T>>& A_log2e) {
  A_log2e.load(block, block.channel_row(block.p.A, 0, block.p.d_state), first);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    for (auto& value : A_log2e.values[k]) value *= Accumulator<T>(1.4426950408889634);
  }
}

// Sums over a half of the states: [step][channel]. Those of the other half are a quarter of the
// banks away, so that the two threads of a pair store theirs without a bank conflict.
template <class Sum, int Channels>
struct alignas(16) HalfSums {
  Sum at[kCudaTile][Channels];
  AlignedVector<float, 8> between;
};

}  // namespace mambablock
