// SPDX-License-Identifier: Apache-2.0
#include "common/cpu/math_arrays.h"

#include "common/cpu/simd.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {
namespace {

template <class F>
void apply(F function, const float* x, float* y, int64_t count) {
  using V = Vector<float>;
  constexpr int lanes = kLanes<float>;
  const int64_t whole = count / lanes * lanes;
  for (int64_t i = 0; i < whole; i += lanes) store_vector(y + i, function(load_vector<V>(x + i)));
  if (whole < count) {
    V v{};
    memcpy(&v, x + whole, (count - whole) * sizeof(float));
    v = function(v);
    memcpy(y + whole, &v, (count - whole) * sizeof(float));
  }
}

}  // namespace

void apply_math(MathFunction function, const float* x, float* y, int64_t count) {
  switch (function) {
    case MathFunction::exp2:
      return apply([](auto v) { return exp2(v); }, x, y, count);
    case MathFunction::exp2_in_range:
      return apply([](auto v) { return exp2_in_range(v); }, x, y, count);
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
      return apply([](auto v) { return softplus_with_derivative(v).derivative; }, x, y, count);
  }
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
