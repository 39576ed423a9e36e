// SPDX-License-Identifier: Apache-2.0
//
// Tiles: `steps` rows of channels, converted to the accumulator's type, one column of vectors after
// the other.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include <utility>

#include "common/cpu/simd.h"
#include "common/views.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {

// The layout of a tile in scratch memory: lane l of column c at step t is element
// c * column + t * step + l. Lanes past the last channel are 0.
struct TileStrides {
  int64_t column, step;
};

// Prefetches a row, to be read into the second-level cache, since the first is too small to keep
// it, or to be written. Whatever only prefetches must be inlined: GCC drops calls of a function
// that has no other effect.
enum class Access { kRead, kWrite };
template <class T, Access Use>
[[gnu::always_inline]] inline void prefetch_row(const void* data, int64_t offset,
                                                int64_t channels) {
  const char* row = reinterpret_cast<const char*>(static_cast<const T*>(data) + offset);
  for (int64_t byte = 0; byte < channels * int64_t(sizeof(T)); byte += 64) {
    if constexpr (Use == Access::kRead) {
      __builtin_prefetch(row + byte, 0, 2);
    } else {
      __builtin_prefetch(row + byte, 1);
    }
  }
}

// Prefetches one of `parts` parts of `count` rows of `length` elements, `stride` apart.
template <class T>
[[gnu::always_inline]] inline void prefetch_part(const T* first, int64_t stride, int64_t count,
                                                 int64_t length, int64_t part, int64_t parts) {
  for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
    prefetch_row<T, Access::kRead>(first, i * stride, length);
  }
}

// One step's `channels` elements, `stride` apart, into columns.
template <class T>
inline void load_row(const T* source, int64_t stride, int64_t channels, Accumulator<T>* target,
                     int64_t column) {
  using A = Accumulator<T>;
  constexpr int lanes = kLanes<A>;
  const int64_t whole = stride == 1 ? channels / lanes * lanes : 0;
  for (int64_t c = 0; c < whole; c += lanes, target += column) {
    store_vector(target, load_whole<Vector<A>>(source + c));
  }
  for (int64_t c = whole; c < channels; c += lanes, target += column) {
    const int64_t rest = channels - c < lanes ? channels - c : lanes;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      target[lane] = lane < rest ? to_accumulator(source[(c + lane) * stride]) : A(0);
    }
  }
}

template <class T>
inline void store_row(T* target, int64_t channels, const Accumulator<T>* source, int64_t column) {
  constexpr int lanes = kLanes<Accumulator<T>>;
  for (; channels >= lanes; channels -= lanes, target += lanes, source += column) {
    store_whole(target, load_vector<Vector<Accumulator<T>>>(source));
  }
  for (int64_t lane = 0; lane < channels; ++lane) {
    target[lane] = from_accumulator<T>(source[lane]);
  }
}

// Exchanges, between the vectors a and b, a's lanes with the bit `Half` and b's without.
template <int Half, class V, int... Lane>
[[gnu::always_inline]] inline void exchange_lanes(V& a, V& b, std::integer_sequence<int, Lane...>) {
  constexpr int lanes = sizeof...(Lane);
  const V first = shuffle<(Lane & Half ? lanes + Lane - Half : Lane)...>(a, b);
  b = shuffle<(Lane & Half ? lanes + Lane : Lane + Half)...>(a, b);
  a = first;
}

// Lane j of vector i becomes lane i of vector j.
template <class V, int Half = 1>
[[gnu::always_inline]] inline void transpose(V* rows) {
  constexpr int lanes = VectorTraits<V>::lanes;
  if constexpr (Half < lanes) {
    for (int i = 0; i < lanes; ++i) {
      if ((i & Half) == 0) {
        exchange_lanes<Half>(rows[i], rows[i + Half], std::make_integer_sequence<int, lanes>());
      }
    }
    transpose<V, Half * 2>(rows);
  }
}

// Transposes a square: as many steps as lanes of as many channels, whose steps are contiguous in
// time's direction, 1 or -1. Prefetches what is `ahead` elements further, unless that is 0.
template <class T>
[[gnu::always_inline]] inline void load_square(const T* source, int64_t channel_stride,
                                               int64_t direction, int64_t ahead,
                                               Accumulator<T>* target, int64_t step_stride) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  const int64_t lowest = direction > 0 ? 0 : lanes - 1;  // of the steps, in memory
  source += lowest * direction;
  target += lowest * step_stride;
  V rows[lanes];
  for (int lane = 0; lane < lanes; ++lane) {
    rows[lane] = load_whole<V>(source + lane * channel_stride);
  }
  if (ahead != 0) prefetch_part(source + ahead, channel_stride, lanes, 1, 0, 1);
  transpose(rows);
  for (int i = 0; i < lanes; ++i) store_vector(target + i * direction * step_stride, rows[i]);
}

// Of channels whose steps are nearer to each other than the channels: in squares, transposed.
template <class T>
inline void load_channels(const T* source, const InputView& input, int64_t steps, int64_t channels,
                          Accumulator<T>* tile, TileStrides strides, int64_t ahead) {
  using A = Accumulator<T>;
  constexpr int lanes = kLanes<A>;
  for (int64_t c = 0; c < channels; c += lanes, source += lanes * input.channel) {
    const int64_t rest = channels - c < lanes ? channels - c : lanes;
    A* column = tile + c / lanes * strides.column;
    const auto square = [&](int64_t step) __attribute__((always_inline)) {
      load_square(source + step * input.time, input.channel, input.time, ahead,
                  column + step * strides.step, strides.step);
    };
    int64_t step = 0;
    if (rest == lanes && llabs(input.time) == 1 && steps >= lanes) {
      for (; step + lanes <= steps; step += lanes) square(step);
      // The last square overlaps the one before, unless single steps take less time.
      if (steps - step > lanes / 4) square(steps - lanes), step = steps;
    }
    // Channel by channel, since each may be in a cache line of its own.
    for (int64_t lane = 0; lane < lanes && step < steps; ++lane) {
      for (int64_t i = step; i < steps; ++i) {
        column[i * strides.step + lane] =
            lane < rest ? to_accumulator(source[i * input.time + lane * input.channel]) : A(0);
      }
    }
  }
}

// Steps [begin, begin + steps) of channels [channel, channel + channels) of one row of the batch.
// Where a channel's steps are contiguous, prefetches what is `ahead` elements further.
template <class T>
inline void load_tile(const InputView& input, int64_t batch, int64_t begin, int64_t steps,
                      int64_t channel, int64_t channels, Accumulator<T>* tile, TileStrides strides,
                      int64_t ahead = 0) {
  const T* source = static_cast<const T*>(input.data) + batch * input.batch + begin * input.time +
                    channel * input.channel;
  if (llabs(input.time) < llabs(input.channel)) {
    return load_channels(source, input, steps, channels, tile, strides, ahead);
  }
  for (int64_t step = 0; step < steps; ++step) {
    load_row(source + step * input.time, input.channel, channels, tile + step * strides.step,
             strides.column);
  }
}

template <class T>
inline void store_tile(const OutputView& output, int64_t batch, int64_t begin, int64_t steps,
                       int64_t channel, int64_t channels, const Accumulator<T>* tile,
                       TileStrides strides) {
  T* target = static_cast<T*>(output.data) + batch * output.batch + begin * output.time + channel;
  for (int64_t step = 0; step < steps; ++step) {
    store_row(target + step * output.time, channels, tile + step * strides.step, strides.column);
  }
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
