// SPDX-License-Identifier: Apache-2.0
#include "math_arrays.h"

#include "simd.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {
namespace {

template <class F>
void apply(F function, const float* x, float* y, int64_t count) {
  using V = Vector<float>;
  constexpr int lanes = kLanes<float>;
  for (int64_t i = 0; i < count; i += lanes) {
    const int64_t rest = count - i < lanes ? count - i : lanes;
    V v{};
    memcpy(&v, x + i, rest * sizeof(float));
    v = function(v);
    memcpy(y + i, &v, rest * sizeof(float));
  }
}

}  // namespace

void apply_math(MathFunction function, const float* x, float* y, int64_t count) {
  switch (function) {
    case MathFunction::exp2:
      return apply([](auto v) { return exp2(v); }, x, y, count);
    case MathFunction::exp:
      return apply([](auto v) { return exp(v); }, x, y, count);
    case MathFunction::log1p_unit:
      return apply([](auto v) { return log1p_unit(v); }, x, y, count);
    case MathFunction::sigmoid:
      return apply([](auto v) { return sigmoid(v); }, x, y, count);
    case MathFunction::silu:
      return apply([](auto v) { return silu(v); }, x, y, count);
    case MathFunction::softplus:
      return apply([](auto v) { return softplus(v); }, x, y, count);
    case MathFunction::softplus_derivative:
      return apply([](auto v) { return softplus_derivative(v); }, x, y, count);
  }
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
