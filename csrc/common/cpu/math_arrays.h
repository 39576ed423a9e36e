// SPDX-License-Identifier: Apache-2.0
//
// The functions of math.h over arrays, so that tests hold them to their stated bounds.
#pragma once

#include <stdint.h>

#include "common/cpu/simd_level.h"

namespace mambablock {

enum class MathFunction {
  exp2,
  exp2_in_range,
  exp,
  log1p_unit,
  sigmoid,
  silu,
  softplus,
  softplus_derivative,
};

MAMBABLOCK_DECLARE_KERNEL(void, apply_math,
                          (MathFunction function, const float* x, float* y, int64_t count));

}  // namespace mambablock
