// SPDX-License-Identifier: Apache-2.0
//
// A thread's part of the states, and of a tile in shared memory.
#pragma once

#include "selective_scan/cuda/tiles.cuh"

namespace mambablock {

// Pairs of values of a tile's steps and channels, such as dt and dt * u: [step][channel], but with
// neighbouring pairs of channels exchanged in every other row of banks, so that threads that store
// four channels each have no bank conflicts.
template <class A, class Block>
struct PairTile {
  using Pair = AlignedVector<A, 2>;

  // Of four channels.
  __device__ __forceinline__ void store(int step, int column, const A (&first)[kPack],
                                        const A (&second)[kPack]) {
#pragma unroll
    for (int i = 0; i < kPack; i += 2) {
      const A values[4] = {first[i], second[i], first[i + 1], second[i + 1]};
      store_vectors(values, at[step][place(column + i)].values);
    }
  }

  __device__ __forceinline__ void load(int step, int column, A (&first)[kPack],
                                       A (&second)[kPack]) const {
#pragma unroll
    for (int i = 0; i < kPack; i += 2) {
      A values[4];
      load_vectors(at[step][place(column + i)].values, values);
      first[i] = values[0];
      second[i] = values[1];
      first[i + 1] = values[2];
      second[i + 1] = values[3];
    }
  }

  // Of the channels [pair, pair + 2), given where they are: both of one, then both of the other.
  __device__ __forceinline__ void load(int step, int place, A (&values)[4]) const {
    load_vectors(at[step][place].values, values);
  }

  __device__ __forceinline__ static int place(int pair) {
    constexpr int per_row = 128 / sizeof(Pair);
    return pair ^ (pair / per_row % 2 * 2);
  }

  alignas(16) Pair at[Block::tile][Block::channels_at_once];
};

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

  template <class Block, class F>
  __device__ __forceinline__ void each(const Block& block, int64_t first, F function) {
    const int64_t d_state = not_hoisted(block.p.d_state);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int c = block.pair + k;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const int64_t n = first + block.part * count + i;
        function(values[k][i], c * d_state + n, c < block.channels && n < d_state);
      }
    }
  }

  // From the block's first channel of a row; 0 where it is null.
  template <class Block>
  __device__ __forceinline__ void load(const Block& block, const A* row, int64_t first) {
    each(block, first, [&](A& value, int64_t at, bool exists) {
      value = row != nullptr && exists ? row[at] : A(0);
    });
  }

  template <class Block>
  __device__ __forceinline__ void store(const Block& block, A* row, int64_t first) {
    each(block, first, [&](A& value, int64_t at, bool exists) {
      if (exists) row[at] = value;
    });
  }

  A values[2][count];
};

// A saved state of two neighbouring channels, in one word if it has 16 bits.
template <class Saved>
using SavedPair =
    std::conditional_t<sizeof(Saved) == 2, uint32_t, AlignedVector<Accumulator<Saved>, 2>>;

// The states on entering steps that are kCudaSavedSteps apart, as (B, saved * N, D). Void is const
// where they are only read.
template <class T, class Block, class Void>
struct SavedStates {
  using A = Accumulator<T>;
  using Saved = SavedState<T>;
  using Place = std::conditional_t<std::is_const_v<Void>, const Saved, Saved>*;
  using Pair = SavedPair<Saved>;
  static constexpr int count = kStatesHeld<A>;

  // From the time `begin` on.
  __device__ SavedStates(const Block& block, Void* saved_states, int64_t begin)
      : block(block),
        between(not_hoisted(block.p.d_state * block.p.channels)),
        place(static_cast<Place>(saved_states)) {
    const int64_t index = block.batch * block.plan.saved + begin / kCudaSavedSteps;
    left = int(block.plan.saved - begin / kCudaSavedSteps);
    const int64_t row = index * block.p.d_state + block.part * count;
    place = advanced(place, row * block.p.channels + block.channel + block.pair);
  }

  // To the state saved so many places later.
  __device__ __forceinline__ void move(int64_t places) {
    place += places * between;
    left -= places;
  }

  // Whether the row has so many.
  __device__ __forceinline__ bool exists() const { return left > 0; }

  __device__ __forceinline__ void load(Pair (&loaded)[count]) const {
    Place at = place;
#pragma unroll
    for (int i = 0; i < count; ++i, at += block.p.channels) {
      loaded[i] = *reinterpret_cast<const Pair*>(at);
    }
  }

  // As they are in memory, so that they take few registers while a load is in flight.
  __device__ __forceinline__ void load(int64_t first, Pair (&loaded)[count]) const {
    with_flag(block.even, [&](auto even) {
      each(first, [&](int i, Place at, bool exists) {
        if constexpr (even.value) {
          loaded[i] = exists ? *reinterpret_cast<const Pair*>(at) : Pair{};
        } else {
          AlignedVector<Saved, 2> pair{};
          if (exists) pair.values[0] = at[0];
          if (exists && block.pair + 1 < block.channels) pair.values[1] = at[1];
          loaded[i] = bit_cast<Pair>(pair);
        }
      });
    });
  }

  __device__ __forceinline__ static void widen(const Pair (&loaded)[count], States<A>& states) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if constexpr (sizeof(Saved) == 2) {
        // As packs are.
        states.values[0][i] = bit_cast<float>(loaded[i] << 16);
        states.values[1][i] = bit_cast<float>(loaded[i] & 0xffff0000u);
      } else {
        states.values[0][i] = loaded[i].values[0];
        states.values[1][i] = loaded[i].values[1];
      }
    }
  }

  // All of them, where the block is full.
  __device__ __forceinline__ void store(const States<A>& states) const {
    Place at = place;
#pragma unroll
    for (int i = 0; i < count; ++i, at += block.p.channels) {
      *reinterpret_cast<Pair*>(at) = narrowed(states, i);
    }
  }

  __device__ __forceinline__ void store(int64_t first, const States<A>& states) const {
    with_flag(block.even, [&](auto even) {
      each(first, [&](int i, Place at, bool exists) {
        if (!exists) return;
        const Pair pair = narrowed(states, i);
        if constexpr (even.value) {
          *reinterpret_cast<Pair*>(at) = pair;
        } else {
          const auto values = bit_cast<AlignedVector<Saved, 2>>(pair);
          at[0] = values.values[0];
          if (block.pair + 1 < block.channels) at[1] = values.values[1];
        }
      });
    });
  }

 private:
  __device__ __forceinline__ static Pair narrowed(const States<A>& states, int i) {
    if constexpr (sizeof(Saved) == 2) {
      return narrowed_pair<Saved>(states.values[0][i], states.values[1][i]);
    } else {
      return {states.values[0][i], states.values[1][i]};
    }
  }

  // Calls function(i, place of both channels', whether it exists) for each state.
  template <class F>
  __device__ __forceinline__ void each(int64_t first, F function) const {
    const SelectiveScanInputs& p = block.p;
    Place at = place;
    if (first > 0) at += first * p.channels;
    const bool has_channels = block.pair < block.channels;
    with_flag(first + kStatesAtOnce<A> <= p.d_state, [&](auto all) {
      const int64_t exist = not_hoisted(p.d_state) - first - block.part * count;
#pragma unroll
      for (int i = 0; i < count; ++i, at += p.channels) {
        function(i, at, has_channels && (all.value || i < exist));
      }
    });
  }

  const Block& block;
  int64_t between;
  int left;  // of the row, from here on
  Place place;
};

// The row of a (B|S, D, N) state that belongs to sequence s; null stays null.
template <class Block, class Pointer>
__device__ __forceinline__ auto sequence_row(const Block& block, Pointer data, int64_t s) {
  using Row = decltype(block.channel_row(data, 0));
  if (data == nullptr) return Row(nullptr);
  return block.channel_row(data, block.sequences.state_row(block.batch, s), block.p.d_state);
}

// The thread's part of A (D, N), with log2(e) in it, so that the decay is one exp2.
template <class Block>
__device__ __forceinline__ void load_A_log2e(const Block& block, int64_t first,
                                             States<typename Block::A>& A_log2e) {
  using A = typename Block::A;
  const ParameterView& parameter = block.p.A;
  const int64_t row = not_hoisted(block.channel) * block.p.d_state;
  A_log2e.each(block, first, [&](A& value, int64_t at, bool exists) {
    value = exists ? parameter_at<typename Block::Activation>(parameter, row + at) : A(0);
  });
  A_log2e.each(block, first, [&](A& value, int64_t, bool exists) {
    if (exists) value = represented(parameter, value) * A(1.4426950408889634);
  });
}

// Sums over the states of each part: [step][channel]. Parts are a quarter of the banks apart, so
// that the threads of a pair of channels store theirs without a bank conflict.
template <class Sum, class Block>
struct alignas(16) PartSums {
  struct alignas(16) Part {
    Sum at[Block::tile][Block::channels_at_once];
    AlignedVector<float, 8> between;
  } parts[kParts];
};

// The same of pairs of sums.
template <class A, class Block>
struct PartPairs {
  struct alignas(16) Part {
    PairTile<A, Block> tile;
    AlignedVector<float, 8> between;
  } parts[kParts];
};

}  // namespace mambablock
