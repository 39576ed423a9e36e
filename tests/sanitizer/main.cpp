// SPDX-License-Identifier: Apache-2.0
//
// Compiled for any processor, so that it can tell that this one lacks the level's instructions.
#include <stdio.h>

#include <stdexcept>

#include "common/cpu/simd_level.h"

namespace mambablock {
void run_kernels();
}

int main() {
  constexpr int skipped = 77;
  try {
    mambablock::simd_level_from_name("sanitizer", MAMBABLOCK_LEVEL_NAME);
  } catch (const std::runtime_error& error) {
    puts(error.what());
    return skipped;
  }
  mambablock::run_kernels();
  return 0;
}
