// SPDX-License-Identifier: Apache-2.0
//
// Between the activation types and the accumulator's.
#pragma once

#include "common/dtype.h"
#include "common/math.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace mambablock {

MAMBABLOCK_INLINE float to_accumulator(float x) { return x; }
MAMBABLOCK_INLINE double to_accumulator(double x) { return x; }
MAMBABLOCK_INLINE float to_accumulator(BFloat16 x) {
  return bit_cast<float>(uint32_t(x.bits) << 16);
}
MAMBABLOCK_INLINE float to_accumulator(Float16 x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#elif defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Scaling by 2^112 rebases the exponent, subnormal numbers included.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const float finite = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t bits =
      (x.bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : bit_cast<uint32_t>(finite);
  return bit_cast<float>(bits | sign);
#endif
}

// The bits of the nearest bfloat16, ties to even, of a float or of each lane of a vector.
template <class V>
MAMBABLOCK_INLINE auto bfloat16_bits(V x) {
  using Int = typename VectorTraits<V>::Int;
  const V nan = V{} + __builtin_nanf("");
  const V one_nan = x != x ? nan : x;
  const Int bits = bit_cast<Int>(one_nan);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Rounds to nearest, ties to even.
template <class T>
MAMBABLOCK_INLINE T from_accumulator(Accumulator<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
#if __CUDA_ARCH__ >= 800
    uint16_t result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(x));
    return {result};
#else
    return {uint16_t(bfloat16_bits(x))};
#endif
  } else if constexpr (std::is_same_v<T, Float16>) {
#if defined(__CUDA_ARCH__)
    uint16_t result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(x));
    return {result};
#elif defined(__F16C__)
    return {_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)};
#else
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00;
    } else if (magnitude >= 0x477ff000) {
      half = 0x7c00;
    } else if (magnitude < 0x38800000) {
      // The sum's last bit weighs 2^-24, the smallest float16, and the adder rounds to it.
      half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    } else {
      half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    return {uint16_t(sign | half)};
#endif
  } else {
    return x;
  }
}

}  // namespace mambablock
