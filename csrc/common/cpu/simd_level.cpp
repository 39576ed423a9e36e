// SPDX-License-Identifier: Apache-2.0
#include "common/cpu/simd_level.h"

#ifdef MAMBABLOCK_HAVE_X86_LEVELS
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mambablock {
namespace {

#ifdef MAMBABLOCK_HAVE_X86_LEVELS
// clang 16's __builtin_cpu_supports knows no f16c.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

SimdLevel highest_level() {
#ifdef MAMBABLOCK_HAVE_X86_LEVELS
  // The features are those of each level's compiler flags.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? SimdLevel::avx512 : SimdLevel::avx2;
  }
#endif
  return SimdLevel::baseline;
}

}  // namespace

SimdLevel simd_level() {
  static const SimdLevel level = [] {
    const char* wanted = std::getenv("MAMBABLOCK_SIMD");
    if (wanted == nullptr || *wanted == '\0') return highest_level();
    return simd_level_from_name("MAMBABLOCK_SIMD", wanted);
  }();
  return level;
}

SimdLevel simd_level_from_name(const char* source, const char* name) {
  const SimdLevel highest = highest_level();
  for (SimdLevel level : {SimdLevel::baseline, SimdLevel::avx2, SimdLevel::avx512}) {
    if (std::string(name) != simd_level_name(level)) continue;
    if (level <= highest) return level;
    throw std::runtime_error(std::string(source) + ": expected a SIMD level up to " +
                             simd_level_name(highest) + ", this processor's highest; got " + name);
  }
  throw std::runtime_error(std::string(source) + ": expected baseline, avx2 or avx512; got \"" +
                           name + "\"");
}

const char* simd_level_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::avx512:
      return "avx512";
    case SimdLevel::avx2:
      return "avx2";
    case SimdLevel::baseline:
      break;
  }
  return "baseline";
}

}  // namespace mambablock
