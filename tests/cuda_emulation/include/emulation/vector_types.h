// SPDX-License-Identifier: Apache-2.0
//
// CUDA's vector types, with its alignments.
#pragma once

#define MAMBABLOCK_EMULATION_VECTOR(scalar, name, alignment)                              \
  struct alignas(alignment) name##2 { scalar x, y; };                                     \
  struct name##3 { scalar x, y, z; };                                                     \
  struct alignas(2 * alignment > 16 ? 16 : 2 * alignment) name##4 { scalar x, y, z, w; }; \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                    \
  inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }       \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

MAMBABLOCK_EMULATION_VECTOR(unsigned short, ushort, 4)
MAMBABLOCK_EMULATION_VECTOR(int, int, 8)
MAMBABLOCK_EMULATION_VECTOR(unsigned, uint, 8)
MAMBABLOCK_EMULATION_VECTOR(long long, longlong, 16)
MAMBABLOCK_EMULATION_VECTOR(float, float, 8)
MAMBABLOCK_EMULATION_VECTOR(double, double, 16)
#undef MAMBABLOCK_EMULATION_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
