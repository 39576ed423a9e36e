// SPDX-License-Identifier: Apache-2.0
// Which compiled copy of a kernel this processor runs. Every kernel file is compiled once per
// level, its functions inside the namespace MAMBABLOCK_SIMD_LEVEL.
#pragma once

namespace mambablock {

enum class SimdLevel { baseline, avx2, avx512 };

// The highest level that the processor has, or the one that the environment variable
// MAMBABLOCK_SIMD names. Read once; throws std::runtime_error as simd_level_from_name does.
SimdLevel simd_level();

// The level called `name`; throws std::runtime_error where there is none or the processor lacks it,
// its text beginning with `source`, the place where the name was given.
SimdLevel simd_level_from_name(const char* source, const char* name);

const char* simd_level_name(SimdLevel level);

}  // namespace mambablock

#ifdef MAMBABLOCK_HAVE_X86_LEVELS

// Declares `return_type name args` in each level's namespace; for use inside namespace mambablock.
#define MAMBABLOCK_DECLARE_KERNEL(return_type, name, args) \
  namespace baseline {                                     \
  return_type name args;                                   \
  }                                                        \
  namespace avx2 {                                         \
  return_type name args;                                   \
  }                                                        \
  namespace avx512 {                                       \
  return_type name args;                                   \
  }

// The address of a function at a given level; the name may carry template arguments.
#define MAMBABLOCK_SELECT_AT(level, ...)                                           \
  ((level) == ::mambablock::SimdLevel::avx512 ? &::mambablock::avx512::__VA_ARGS__ \
   : (level) == ::mambablock::SimdLevel::avx2 ? &::mambablock::avx2::__VA_ARGS__   \
                                              : &::mambablock::baseline::__VA_ARGS__)

#else

#define MAMBABLOCK_DECLARE_KERNEL(return_type, name, args) \
  namespace baseline {                                     \
  return_type name args;                                   \
  }

#define MAMBABLOCK_SELECT_AT(level, ...) \
  (static_cast<void>(level), &::mambablock::baseline::__VA_ARGS__)

#endif

// The address of a function at the level in use.
#define MAMBABLOCK_SELECT(...) MAMBABLOCK_SELECT_AT(::mambablock::simd_level(), __VA_ARGS__)
