// SPDX-License-Identifier: Apache-2.0
//
// Whether this processor has a SIMD level. A program of its own: what the linker merges of a
// level's program may be compiled for that level.
#include <stdio.h>

#include <stdexcept>

#include "common/cpu/simd_level.h"

int main(int, char** arguments) {
  constexpr int skipped = 77;
  try {
    mambablock::simd_level_from_name("sanitizer", arguments[1]);
  } catch (const std::runtime_error& error) {
    puts(error.what());
    return skipped;
  }
  return 0;
}
