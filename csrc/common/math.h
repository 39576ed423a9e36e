// SPDX-License-Identifier: Apache-2.0
//
// Every formula of the project, once, for the CPU and for CUDA. `V` is float, double, or a SIMD
// vector of either. Bounds are in units in the last place (ULP) of float32 and are held by
// tests/test_math.py; float64 is the C library's. CUDA takes exp2 and the reciprocal from its
// special function unit, whose results below 2^-126 are 0; there exp's bound is 2 + |x| ULP.
#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#define MAMBABLOCK_INLINE __host__ __device__ __forceinline__
#else
#define MAMBABLOCK_INLINE [[gnu::always_inline]] inline
#endif

namespace mambablock {

// As std::bit_cast, which vectors do not satisfy and nvcc's front end cannot compile.
template <class To, class From>
MAMBABLOCK_INLINE To bit_cast(const From& from) {
#if defined(__CUDACC__)
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
#else
  return __builtin_bit_cast(To, from);
#endif
}

template <class V, class = void>
struct VectorTraits {
  using Scalar = std::remove_cvref_t<decltype(std::declval<V&>()[0])>;
  using IntScalar = std::conditional_t<sizeof(Scalar) == 8, int64_t, int32_t>;
  typedef IntScalar Int __attribute__((vector_size(sizeof(V))));
  static constexpr int lanes = sizeof(V) / sizeof(Scalar);
};

template <class V>
struct VectorTraits<V, std::enable_if_t<std::is_floating_point_v<V>>> {
  using Scalar = V;
  using Int = std::conditional_t<sizeof(V) == 8, int64_t, int32_t>;
  static constexpr int lanes = 1;
};

template <class V>
using ScalarOf = typename VectorTraits<V>::Scalar;

template <class V>
inline constexpr bool is_float64 = std::is_same_v<ScalarOf<V>, double>;

// Calls a scalar function on every lane; only float64 needs it.
template <class V, class F>
MAMBABLOCK_INLINE V map_lanes(V x, F function) {
  if constexpr (VectorTraits<V>::lanes == 1) {
    return function(x);
  } else {
    for (int lane = 0; lane < VectorTraits<V>::lanes; ++lane) x[lane] = function(x[lane]);
    return x;
  }
}

// The larger and the smaller of two; a NaN in x stays. Compilers do not make the one instruction of
// the comparison themselves.
template <class V>
MAMBABLOCK_INLINE V max_keep_nan(V bound, V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && !is_float64<V>)
    return V(_mm512_max_ps(__m512(bound), __m512(x)));
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32 && !is_float64<V>)
    return V(_mm256_max_ps(__m256(bound), __m256(x)));
#endif
  return bound > x ? bound : x;
}

template <class V>
MAMBABLOCK_INLINE V min_keep_nan(V bound, V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && !is_float64<V>)
    return V(_mm512_min_ps(__m512(bound), __m512(x)));
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32 && !is_float64<V>)
    return V(_mm256_min_ps(__m256(bound), __m256(x)));
#endif
  return bound < x ? bound : x;
}

inline constexpr float kLog2E = 1.44269504088896341f;

// Adding this number rounds a float32 to an integer, left in the low bits of the sum.
inline constexpr float kRoundingShift = 12582912.0f;

// The bits of x's fraction that exp2 looks up, where an instruction takes lanes of one vector by
// the indices in another; a shorter polynomial then does for the rest.
template <class V>
MAMBABLOCK_INLINE constexpr int exp2_table_bits() {
  if constexpr (is_float64<V>) return 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return 4;
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return 3;
#endif
  return 0;
}

// 2^f for f of at most 2^-(TableBits + 1) in magnitude: minimax polynomials of relative error
// 2^-28.9, 2^-25.1 and 2^-29.2 for 0, 3 and 4 bits, exactly 1 at 0.
template <int TableBits, class V>
MAMBABLOCK_INLINE V exp2_fraction(V f) {
  if constexpr (TableBits == 4) {
    V p = f * 5.550213531e-02f + 2.402342856e-01f;
    p = p * f + 6.931471825e-01f;
    return p * f + 1.0f;
  } else if constexpr (TableBits == 3) {
    V p = f * 5.549622327e-02f + 2.402576357e-01f;
    p = p * f + 6.931472421e-01f;
    return p * f + 1.0f;
  } else {
    V p = f * 1.535336224e-04f + 1.339887474e-03f;
    p = p * f + 9.618437359e-03f;
    p = p * f + 5.550332470e-02f;
    p = p * f + 2.402264791e-01f;
    p = p * f + 6.931472029e-01f;
    return p * f + 1.0f;
  }
}

// For the index i in the low bits of `shifted`, the bits of 2^(i / size of the table) less i at the
// top of the significand: whoever adds the whole of `shifted` there adds i back.
template <class V>
MAMBABLOCK_INLINE auto exp2_lookup(V shifted) {
  using Int [[maybe_unused]] = typename VectorTraits<V>::Int;
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    const Int table{0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
                    0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
                    0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
    return Int(_mm512_permutexvar_epi32(__m512i(shifted), __m512i(table)));
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) {
    const Int table{0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                    0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
    return Int(_mm256_permutevar8x32_epi32(__m256i(table), __m256i(shifted)));
  }
#endif
}

// p * 2^k, where `shifted` is k + kRoundingShift, by adding k to the exponent's bits.
template <class V>
MAMBABLOCK_INLINE V scale_by_exponent(V p, V shifted) {
  using Int = typename VectorTraits<V>::Int;
  const Int k = bit_cast<Int>(shifted) << 23;
  return bit_cast<V>(bit_cast<Int>(p) + k);
}

// 2^x for x in [-126, 127.4], within exp2's bound, in fewer instructions.
template <class V>
MAMBABLOCK_INLINE V exp2_in_range(V x) {
  if constexpr (is_float64<V>) {
    return map_lanes(x, [](double lane) { return ::exp2(lane); });
  } else {
    constexpr int bits = exp2_table_bits<V>();
    constexpr float shift = kRoundingShift / (1 << bits);
    const V shifted = x + shift;
    const V p = exp2_fraction<bits>(V(x - (shifted - shift)));
    if constexpr (bits == 0) {
      return scale_by_exponent(p, shifted);
    } else {
      using Int = typename VectorTraits<V>::Int;
      const Int scale = exp2_lookup(shifted) + (bit_cast<Int>(shifted) << (23 - bits));
      return p * bit_cast<V>(scale);
    }
  }
}

// 2^x. At most 2 ULP for x in [-126, 128), infinity above; below, a value in [0, 2^-126].
template <class V>
MAMBABLOCK_INLINE V exp2(V x) {
  if constexpr (is_float64<V>) {
    return exp2_in_range(x);
  } else {
#if defined(__CUDA_ARCH__)
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
    x = min_keep_nan(V(V{} + 128.0f), max_keep_nan(V(V{} - 127.0f), x));
    constexpr int bits = exp2_table_bits<V>();
    if constexpr (bits == 0) {
      return exp2_in_range(x);
    } else {
      // The significand first, since 2^k alone may overflow.
      using Int = typename VectorTraits<V>::Int;
      constexpr float shift = kRoundingShift / (1 << bits);
      const V shifted = x + shift;
      const Int index = bit_cast<Int>(shifted) & ((1 << bits) - 1);
      const Int significand = exp2_lookup(shifted) + (index << (23 - bits));
      const V p = exp2_fraction<bits>(V(x - (shifted - shift))) * bit_cast<V>(significand);
      return bit_cast<V>(bit_cast<Int>(p) + (bit_cast<Int>(shifted) >> bits << 23));
    }
  }
}

// e^r for r in [-ln 2 / 2, ln 2 / 2]: exp2_fraction's polynomial of r log2(e).
template <class V>
MAMBABLOCK_INLINE V exp_remainder(V r) {
  V p = r * 1.384365381e-03f + 8.374155516e-03f;
  p = p * r + 4.166800204e-02f;
  p = p * r + 1.666643126e-01f;
  p = p * r + 4.999999420e-01f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

// e^x. At most 2 ULP where the result is a normal number; 0 below that, infinity above.
template <class V>
MAMBABLOCK_INLINE V exp(V x) {
  if constexpr (is_float64<V>) {
    return map_lanes(x, [](double lane) { return ::exp(lane); });
  } else {
#if defined(__CUDA_ARCH__)
    return exp2(x * kLog2E);
#endif
    // The high part of ln 2 has 15 trailing zero bits, so its product with k is exact.
    constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) {
      constexpr int to_integer = 0 | 8;  // the nearest one; no exceptions
      x = min_keep_nan(V(V{} + 90.0f), max_keep_nan(V(V{} - 105.0f), x));
      const V k = V(_mm512_roundscale_ps(__m512(V(x * kLog2E)), to_integer));
      const V p = exp_remainder(V((x - k * ln2_high) - k * ln2_low));
      const V result = V(_mm512_scalef_ps(__m512(p), __m512(k)));
      return x < -87.3365402f ? V{} : result;
    }
#endif
    const V shifted = x * kLog2E + kRoundingShift;
    const V k = shifted - kRoundingShift;
    const V result = scale_by_exponent(exp_remainder(V((x - k * ln2_high) - k * ln2_low)), shifted);
    const V zero = V{}, infinity = V{} + HUGE_VALF;
    const V bounded = x < -87.3365402f ? zero : result;
    return x > 88.7228394f ? infinity : bounded;
  }
}

// -e^x of a scalar, by the C library on every device, as PyTorch computes A of A_log.
template <class A>
MAMBABLOCK_INLINE A negative_exp(A x) {
  if constexpr (is_float64<A>) return -::exp(x);
  return -::expf(float(x));
}

// log(1 + x) for x in [0, 1]: x times a minimax polynomial of relative error 2^-27.7. At most 3
// ULP.
template <class V>
MAMBABLOCK_INLINE V log1p_unit(V x) {
  if constexpr (is_float64<V>) {
    return map_lanes(x, [](double lane) { return ::log1p(lane); });
  } else {
    V p = x * -3.244025082e-03f + 1.985146378e-02f;
    p = p * x - 5.695954091e-02f;
    p = p * x + 1.060365604e-01f;
    p = p * x - 1.530559361e-01f;
    p = p * x + 1.967593978e-01f;
    p = p * x - 2.495413380e-01f;
    p = p * x + 3.332996244e-01f;
    p = p * x - 4.999990242e-01f;
    p = p * x + 1.0f;
    return p * x;
  }
}

// x / y for y of at least 1.
template <class V>
MAMBABLOCK_INLINE V divide(V x, V y) {
#if defined(__CUDA_ARCH__)
  if constexpr (!is_float64<V>) {
    float reciprocal;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(y));
    return x * reciprocal;
  }
#endif
  return x / y;
}

// 1 / (1 + e^-x). At most 4 ULP where the result is a normal number.
template <class V>
MAMBABLOCK_INLINE V sigmoid(V x) {
  const V one = V{} + ScalarOf<V>(1);
  return divide(one, V(one + exp(V(-x))));
}

// x sigmoid(x). At most 4 ULP where e^-x is finite, 0 below.
template <class V>
MAMBABLOCK_INLINE V silu(V x) {
  return divide(x, V(exp(V(-x)) + ScalarOf<V>(1)));
}

// The derivative of silu at x, given sigmoid(x).
template <class V>
MAMBABLOCK_INLINE V silu_derivative(V x, V sigmoid_x) {
  return sigmoid_x * (x * (ScalarOf<V>(1) - sigmoid_x) + ScalarOf<V>(1));
}

template <class V>
struct Softplus {
  V value, derivative;
};

// -|x|
template <class V>
MAMBABLOCK_INLINE V minus_magnitude(V x) {
#if defined(__CUDA_ARCH__)
  return -fabs(x);
#else
  return x < ScalarOf<V>(0) ? x : V(-x);
#endif
}

// log(1 + e^x), and x itself above 20 as torch.nn.functional.softplus, with the derivative, which
// is sigmoid(x) and 1. Both at most 4 ULP where e^x is a normal number.
template <class V>
MAMBABLOCK_INLINE Softplus<V> softplus_with_derivative(V x) {
  const V zero = V{}, one = V{} + ScalarOf<V>(1);
  const V e = exp(minus_magnitude(x));
  const V value = max_keep_nan(zero, x) + log1p_unit(e);
  const V derivative = divide(V(x < ScalarOf<V>(0) ? e : one), V(e + one));
  if constexpr (is_float64<V>) {
    return {x > ScalarOf<V>(20) ? x : value, x > ScalarOf<V>(20) ? one : derivative};
  } else {
    return {value, derivative};  // which float32 rounds to x and 1 above 20
  }
}

template <class V>
MAMBABLOCK_INLINE V softplus(V x) {
  return softplus_with_derivative(x).value;
}

}  // namespace mambablock
