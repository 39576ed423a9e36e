// SPDX-License-Identifier: Apache-2.0
//
// SIMD vectors of the level that a kernel file is compiled for, and tiles of them: `steps` rows of
// channels, converted to the accumulator's type, one column of vectors after the other.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <utility>

#include "convert.h"
#include "math.h"
#include "strided.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
inline constexpr int kLanes = kVectorBytes / sizeof(A);

// Goes through rows of (batch, channel) [begin, end) with work(batch, channel, count), by `count`
// channels of one batch, at most a vector of them.
template <class A, class Work>
[[gnu::always_inline]] inline void for_each_vector(int64_t begin, int64_t end, int64_t channels,
                                                   Work work) {
  while (begin < end) {
    const int64_t c = begin % channels;
    const int64_t rest = end - begin < channels - c ? end - begin : channels - c;
    const int64_t count = rest < kLanes<A> ? rest : kLanes<A>;
    work(begin / channels, c, count);
    begin += count;
  }
}

template <class V>
struct HalvesOf {
  typedef uint16_t type __attribute__((vector_size(sizeof(V) / 2)));
};
template <class V>
using Halves = typename HalvesOf<V>::type;

template <class V>
[[gnu::always_inline]] inline V load_vector(const ScalarOf<V>* source) {
  V v;
  memcpy(&v, source, sizeof v);
  return v;
}

template <class V>
[[gnu::always_inline]] inline void store_vector(ScalarOf<V>* target, V v) {
  memcpy(target, &v, sizeof v);
}

// A vector's worth of elements, converted.
template <class V, class T>
[[gnu::always_inline]] inline V load_whole(const T* source) {
  if constexpr (std::is_same_v<T, ScalarOf<V>>) {
    return load_vector<V>(source);
  } else if constexpr (std::is_same_v<T, BFloat16> && !is_float64<V>) {
    Halves<V> halves;
    memcpy(&halves, source, sizeof halves);
    using Int = typename VectorTraits<V>::Int;
    return __builtin_bit_cast(V, __builtin_convertvector(halves, Int) << 16);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<T, Float16> && !is_float64<V>) {
    return V(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))));
#elif defined(__F16C__)
  } else if constexpr (std::is_same_v<T, Float16> && !is_float64<V>) {
    return V(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
#endif
  } else {
    V v;
    for (int i = 0; i < VectorTraits<V>::lanes; ++i) v[i] = to_accumulator(source[i]);
    return v;
  }
}

template <class T, class V>
[[gnu::always_inline]] inline void store_whole(T* target, V v) {
  if constexpr (std::is_same_v<T, ScalarOf<V>>) {
    store_vector(target, v);
  } else if constexpr (std::is_same_v<T, BFloat16> && !is_float64<V>) {
    const auto halves = __builtin_convertvector(bfloat16_bits(v), Halves<V>);
    memcpy(target, &halves, sizeof halves);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<T, Float16> && !is_float64<V>) {
    const auto halves = _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT);
    memcpy(target, &halves, sizeof halves);
#elif defined(__F16C__)
  } else if constexpr (std::is_same_v<T, Float16> && !is_float64<V>) {
    const auto halves = _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT);
    memcpy(target, &halves, sizeof halves);
#endif
  } else {
    for (int i = 0; i < VectorTraits<V>::lanes; ++i) target[i] = from_accumulator<T>(v[i]);
  }
}

// More bytes of output than this are gone from the caches before anyone reads them.
inline constexpr int64_t kCacheBytes = 64 << 20;

// Whether outputs can be written in whole cache lines past the caches, which saves reading them
// first.
template <class T>
inline constexpr bool kCanStream = kVectorBytes == 64 && std::is_same_v<T, Accumulator<T>>;

// As store_whole, past the caches; finish_streaming comes before another thread reads it.
template <class T, class V>
[[gnu::always_inline]] inline void stream_whole(T* target, V v) {
#if defined(__AVX512F__)
  if (kCanStream<T> && reinterpret_cast<uintptr_t>(target) % sizeof v == 0) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(target), __m512i(v));
  }
#endif
  store_whole(target, v);
}

inline void finish_streaming() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// A kernel's own memory: `count` elements, handed out in at most 16 pieces that begin on cache
// lines.
template <class A>
class Scratch {
 public:
  static constexpr int64_t kLine = 64 / sizeof(A);

  explicit Scratch(int64_t count)
      : data_(static_cast<A*>(aligned_alloc(64, (count / kLine + 1 + kMostPieces) * 64))) {
    if (data_ == nullptr) abort();
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  A* take(int64_t count) {
    A* taken = data_ + used_;
    used_ += (count + kLine - 1) / kLine * kLine;
    return taken;
  }
  void take_all_back() { used_ = 0; }

 private:
  static constexpr int64_t kMostPieces = 16;
  A* data_;
  int64_t used_ = 0;
};

// Where the steps of a block of channels lie in a kernel's own memory: lane l of column c at a step
// is element c * column + step * step + l. Lanes past the last channel are kept 0.
struct TileStrides {
  int64_t column, step;
};

// Asks for a row's memory ahead of its use, to be read into the second-level cache, since the first
// is too small for it to last there, or to be written. Whatever only prefetches must be inlined:
// GCC takes a function without other effects for one without any.
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

// One step: `channels` elements, `stride` apart, to or from columns.
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

// `count` elements, `stride` apart; the lanes past them are 0.
template <class A, class T>
[[gnu::always_inline]] inline Vector<A> load_converted(const T* source, int64_t stride,
                                                       int64_t count) {
  if (stride == 1 && count == kLanes<A>) return load_whole<Vector<A>>(source);
  A lanes[kLanes<A>]{};
  for (int64_t lane = 0; lane < count; ++lane) {
    lanes[lane] = to_accumulator(source[lane * stride]);
  }
  return load_vector<Vector<A>>(lanes);
}

// The first `count` lanes, `stride` apart, as the type that the target has.
template <class T, class V>
[[gnu::always_inline]] inline void store_converted(T* target, int64_t stride, V v, int64_t count) {
  using A = ScalarOf<V>;
  if (stride == 1 && count == kLanes<A>) return store_whole(target, v);
  A lanes[kLanes<A>];
  store_vector(lanes, v);
  for (int64_t lane = 0; lane < count; ++lane) {
    target[lane * stride] = from_accumulator<T>(lanes[lane]);
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
  using Mask = typename VectorTraits<V>::Int;
  constexpr int lanes = sizeof...(Lane);
  const Mask low{(Lane & Half ? lanes + Lane - Half : Lane)...};
  const Mask high{(Lane & Half ? lanes + Lane : Lane + Half)...};
  const V first = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
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

// As many steps as lanes of as many channels, each channel's steps side by side, transposed. Asks
// for those `Ahead` steps later.
template <int64_t Ahead, class T>
[[gnu::always_inline]] inline void load_square(const T* source, int64_t channel_stride,
                                               Accumulator<T>* target, int64_t step_stride) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  V rows[lanes];
  for (int lane = 0; lane < lanes; ++lane, source += channel_stride) {
    rows[lane] = load_whole<V>(source);
    if constexpr (Ahead > 0) prefetch_row<T, Access::kRead>(source, Ahead, 1);
  }
  transpose(rows);
  for (int i = 0; i < lanes; ++i) store_vector(target + i * step_stride, rows[i]);
}

// Steps nearer to each other than channels: whole squares are read along time and transposed.
template <int64_t Ahead, class T>
inline void load_channels(const T* source, const Strided3& input, int64_t steps, int64_t channels,
                          Accumulator<T>* tile, TileStrides strides) {
  using A = Accumulator<T>;
  constexpr int lanes = kLanes<A>;
  for (int64_t c = 0; c < channels; c += lanes, source += lanes * input.channel) {
    const int64_t rest = channels - c < lanes ? channels - c : lanes;
    A* column = tile + c / lanes * strides.column;
    const auto square = [&](int64_t step) __attribute__((always_inline)) {
      load_square<Ahead>(source + step, input.channel, column + step * strides.step, strides.step);
    };
    int64_t step = 0;
    if (rest == lanes && input.time == 1 && steps >= lanes) {
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

// Asks for one of `parts` parts of `count` stretches of `length` elements, `stride` apart.
template <class T>
[[gnu::always_inline]] inline void prefetch_part(const T* first, int64_t stride, int64_t count,
                                                 int64_t length, int64_t part, int64_t parts) {
  for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
    prefetch_row<T, Access::kRead>(first, i * stride, length);
  }
}

// Steps [begin, begin + steps) of channels [channel, channel + channels) of one row of the batch.
template <class T, int64_t Ahead = 0>
inline void load_tile(const Strided3& input, int64_t batch, int64_t begin, int64_t steps,
                      int64_t channel, int64_t channels, Accumulator<T>* tile,
                      TileStrides strides) {
  const T* source = static_cast<const T*>(input.data) + batch * input.batch + begin * input.time +
                    channel * input.channel;
  if (llabs(input.time) < llabs(input.channel)) {
    return load_channels<Ahead>(source, input, steps, channels, tile, strides);
  }
  for (int64_t step = 0; step < steps; ++step) {
    load_row(source + step * input.time, input.channel, channels, tile + step * strides.step,
             strides.column);
  }
}

template <class T>
inline void store_tile(const Strided3Out& output, int64_t batch, int64_t begin, int64_t steps,
                       int64_t channel, int64_t channels, const Accumulator<T>* tile,
                       TileStrides strides) {
  T* target = static_cast<T*>(output.data) + batch * output.batch + begin * output.time + channel;
  for (int64_t step = 0; step < steps; ++step) {
    store_row(target + step * output.time, channels, tile + step * strides.step, strides.column);
  }
}

// The sum of the lanes, always in the same order.
template <class V>
[[gnu::always_inline]] inline ScalarOf<V> sum_lanes(V v) {
  using S = ScalarOf<V>;
  S lanes[VectorTraits<V>::lanes];
  memcpy(lanes, &v, sizeof v);
  for (int width = VectorTraits<V>::lanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// Whether every lane is at most the bound; a NaN is not.
template <class V>
[[gnu::always_inline]] inline bool all_at_most(V v, ScalarOf<V> bound) {
  bool all = true;
  for (int lane = 0; lane < VectorTraits<V>::lanes; ++lane) all &= v[lane] <= bound;
  return all;
}

// One level of sums_of_vectors: lanes without the bit `Half` sum pairs of a's, the others of b's.
template <int Half, class V, int... Lane>
[[gnu::always_inline]] inline V sum_halves(V a, V b, std::integer_sequence<int, Lane...>) {
  using Mask = typename VectorTraits<V>::Int;
  constexpr int lanes = sizeof...(Lane);
  const Mask same{(Lane & Half ? lanes + Lane : Lane)...};
  const Mask other{(Lane & Half ? lanes + (Lane ^ Half) : Lane ^ Half)...};
  return __builtin_shuffle(a, b, same) + __builtin_shuffle(a, b, other);
}

// Lane l becomes the sum of the lanes of the vector at l * stride, for the first `Count` of lanes.
template <class V, int Count = VectorTraits<V>::lanes>
[[gnu::always_inline]] inline V sums_of_vectors(const ScalarOf<V>* first, int64_t stride) {
  if constexpr (Count == 1) {
    return load_vector<V>(first);
  } else {
    constexpr int lanes = VectorTraits<V>::lanes, half = lanes / Count;
    // Neighbouring vectors meet last, so the first level pairs those half of all apart.
    return sum_halves<half>(sums_of_vectors<V, Count / 2>(first, stride * 2),
                            sums_of_vectors<V, Count / 2>(first + stride, stride * 2),
                            std::make_integer_sequence<int, lanes>());
  }
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
