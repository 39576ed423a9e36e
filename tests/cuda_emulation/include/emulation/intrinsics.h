// SPDX-License-Identifier: Apache-2.0
//
// The intrinsic functions of device code. Each waiting point is known by the place of its call.
#pragma once

#include <bit>
#include <type_traits>

#include "block.h"

inline void __syncthreads(
    mambablock_emulation::Place place = mambablock_emulation::Place::current()) {
  mambablock_emulation::sync_block("__syncthreads", place);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       mambablock_emulation::Place place = mambablock_emulation::Place::current()) {
  mambablock_emulation::sync_warp(mambablock_emulation::WarpOp::sync, mask, 0, 0, 32, place);
}

namespace mambablock_emulation {

template <class T>
concept Shufflable = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <Shufflable T>
T shuffle(WarpOp op, unsigned mask, T value, int operand, int width, const Place& place) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  const uint64_t bits = std::bit_cast<Bits>(value);
  return std::bit_cast<T>(Bits(sync_warp(op, mask, bits, operand, width, place)));
}

}  // namespace mambablock_emulation

#define MAMBABLOCK_EMULATION_SHUFFLE(name, op)                                                   \
  template <mambablock_emulation::Shufflable T>                                                  \
  T name(unsigned mask, T value, int operand, int width = 32,                                    \
         mambablock_emulation::Place place = mambablock_emulation::Place::current()) {           \
    return mambablock_emulation::shuffle(mambablock_emulation::WarpOp::op, mask, value, operand, \
                                         width, place);                                          \
  }
MAMBABLOCK_EMULATION_SHUFFLE(__shfl_sync, shuffle)
MAMBABLOCK_EMULATION_SHUFFLE(__shfl_xor_sync, shuffle_xor)
MAMBABLOCK_EMULATION_SHUFFLE(__shfl_up_sync, shuffle_up)
MAMBABLOCK_EMULATION_SHUFFLE(__shfl_down_sync, shuffle_down)
#undef MAMBABLOCK_EMULATION_SHUFFLE

inline unsigned __ballot_sync(
    unsigned mask, int predicate,
    mambablock_emulation::Place place = mambablock_emulation::Place::current()) {
  return unsigned(mambablock_emulation::sync_warp(mambablock_emulation::WarpOp::ballot, mask,
                                                  predicate != 0, 0, 32, place));
}

inline int __any_sync(unsigned mask, int predicate,
                      mambablock_emulation::Place place = mambablock_emulation::Place::current()) {
  return __ballot_sync(mask, predicate, place) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      mambablock_emulation::Place place = mambablock_emulation::Place::current()) {
  return __ballot_sync(mask, predicate, place) == mask;
}

inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}

template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
