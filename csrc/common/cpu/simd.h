// SPDX-License-Identifier: Apache-2.0
//
// SIMD vectors of the level that a kernel file is compiled for, and scratch memory.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <utility>

#include "common/convert.h"
#include "common/math.h"

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

// Calls work(batch, channel, count) for the (batch, channel) pairs [begin, end), `count` channels
// of one row of the batch at a time, at most a vector of them.
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

// A vector's worth of 16-bit elements, each a lane of 32 bits. g++ 12 makes of
// __builtin_convertvector two conversions of half a vector.
template <class V>
[[gnu::always_inline]] inline typename VectorTraits<V>::Int load_widened(const void* source) {
  using Int = typename VectorTraits<V>::Int;
#if defined(__AVX512F__)
  return Int(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(source))));
#elif defined(__AVX2__)
  return Int(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(source))));
#else
  Halves<V> halves;
  memcpy(&halves, source, sizeof halves);
  return __builtin_convertvector(halves, Int);
#endif
}

// A vector's worth of elements, converted.
template <class V, class T>
[[gnu::always_inline]] inline V load_whole(const T* source) {
  if constexpr (std::is_same_v<T, ScalarOf<V>>) {
    return load_vector<V>(source);
#if defined(__aarch64__)
  } else if constexpr (std::is_same_v<T, BFloat16> && !is_float64<V>) {
    // g++ 12 converts a generic vector of 64 bits lane by lane.
    return V(vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(&source->bits)), 16)));
#endif
  } else if constexpr (std::is_same_v<T, BFloat16> && !is_float64<V>) {
    return __builtin_bit_cast(V, load_widened<V>(source) << 16);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<T, Float16> && !is_float64<V>) {
    return V(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))));
#elif defined(__F16C__)
  } else if constexpr (std::is_same_v<T, Float16> && !is_float64<V>) {
    return V(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
#elif defined(__aarch64__)
  } else if constexpr (std::is_same_v<T, Float16> && !is_float64<V>) {
    return V(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&source->bits))));
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
#elif defined(__aarch64__)
  } else if constexpr (std::is_same_v<T, Float16> && !is_float64<V>) {
    vst1_u16(&target->bits, vreinterpret_u16_f16(vcvt_f16_f32(float32x4_t(v))));
#endif
  } else {
    for (int i = 0; i < VectorTraits<V>::lanes; ++i) target[i] = from_accumulator<T>(v[i]);
  }
}

// Larger outputs are evicted from the caches before anyone reads them.
inline constexpr int64_t kCacheBytes = 64 << 20;

// Whether a vector fills a cache line, which a non-temporal store then writes without reading it.
template <class T>
inline constexpr bool kHasNonTemporal = kVectorBytes == 64 && std::is_same_v<T, Accumulator<T>>;

// As store_whole, non-temporal where it can be; fence_non_temporal must follow before another
// thread reads it.
template <class T, class V>
[[gnu::always_inline]] inline void store_non_temporal(T* target, V v) {
#if defined(__AVX512F__)
  if (kHasNonTemporal<T> && reinterpret_cast<uintptr_t>(target) % sizeof v == 0) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(target), __m512i(v));
  }
#endif
  store_whole(target, v);
}

inline void fence_non_temporal() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// Scratch memory of `count` elements, taken in at most 16 pieces that begin on cache lines.
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
  void reset() { used_ = 0; }

 private:
  static constexpr int64_t kMostPieces = 16;
  A* data_;
  int64_t used_ = 0;
};

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

// Lane l is the lane Index[l] of a and b, one after the other.
template <int... Index, class V>
[[gnu::always_inline]] inline V shuffle(V a, V b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, Index...);
#else  // g++ 11
  return __builtin_shuffle(a, b, typename VectorTraits<V>::Int{Index...});
#endif
}

// One level of sums_of_vectors: lanes without the bit `Half` sum pairs of a's, the others of b's.
template <int Half, class V, int... Lane>
[[gnu::always_inline]] inline V sum_halves(V a, V b, std::integer_sequence<int, Lane...>) {
  constexpr int lanes = sizeof...(Lane);
  return shuffle<(Lane & Half ? lanes + Lane : Lane)...>(a, b) +
         shuffle<(Lane & Half ? lanes + (Lane ^ Half) : Lane ^ Half)...>(a, b);
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
