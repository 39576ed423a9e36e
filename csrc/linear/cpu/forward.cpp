// SPDX-License-Identifier: Apache-2.0
//
// Each product of two rows is summed in kLanesOfSum lanes, then in a tree, whatever the vectors'
// length. This file is compiled without contraction to fused multiply-adds, which the baseline
// lacks.
#include "common/cpu/simd.h"
#include "linear/cpu/kernels.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {
namespace {

constexpr int kLanesOfSum = 32;

// Rows of the weight for which a group of rows of x stays in the first-level cache.
constexpr int64_t kWeightRows = 8;

// The sum of all lanes: of those half of all apart first, at last of neighbours.
template <class V, int Parts>
[[gnu::always_inline]] inline ScalarOf<V> sum_parts(V (&parts)[Parts]) {
  for (int half = Parts / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return sum_lanes(parts[0]);
}

// sums[r] = x_r . weight, for `Rows` rows of x.
template <int Rows, class W>
[[gnu::always_inline]] inline void dot_products(const Accumulator<W>* x, int64_t x_row,
                                                const W* weight, int64_t size,
                                                Accumulator<W> (&sums)[Rows]) {
  using A = Accumulator<W>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>, parts = kLanesOfSum / lanes;
  V partial[Rows][parts]{};
  int64_t k = 0;
  for (; k + kLanesOfSum <= size; k += kLanesOfSum) {
    for (int part = 0; part < parts; ++part) {
      const int64_t at = k + part * lanes;
      const V values = load_whole<V>(weight + at);
      for (int r = 0; r < Rows; ++r) {
        partial[r][part] += values * load_vector<V>(x + r * x_row + at);
      }
    }
  }
  for (int part = 0; part < parts; ++part) {
    const int64_t at = k + part * lanes, rest = size - at;
    if (rest <= 0) break;
    const int64_t count = rest < lanes ? rest : lanes;
    const V values = load_converted<A>(weight + at, 1, count);
    for (int r = 0; r < Rows; ++r) {
      partial[r][part] += values * load_converted<A>(x + r * x_row + at, 1, count);
    }
  }
  for (int r = 0; r < Rows; ++r) sums[r] = sum_parts(partial[r]);
}

// `Rows` rows of x from the first-th on, with rows [begin, end) of the weight.
template <int Rows, class W, class Y>
void multiply_rows(const LinearParams& p, int64_t first, int64_t begin, int64_t end) {
  using A = Accumulator<W>;
  const A* x = static_cast<const A*>(p.x) + first * p.x_row;
  const A* bias = static_cast<const A*>(p.bias);
  Y* y = static_cast<Y*>(p.y) + first * p.y_row;
  for (int64_t n = begin; n < end; ++n) {
    A sums[Rows];
    dot_products<Rows>(x, p.x_row, static_cast<const W*>(p.weight) + n * p.weight_row,
                       p.in_features, sums);
    for (int r = 0; r < Rows; ++r) {
      const A sum = bias == nullptr ? sums[r] : sums[r] + bias[n];
      y[r * p.y_row + n] = from_accumulator<Y>(sum);
    }
  }
}

template <class W, class Y>
void multiply(const LinearParams& p, int64_t begin, int64_t end) {
  if (p.rows == 1) return multiply_rows<1, W, Y>(p, 0, begin, end);
  for (; begin < end; begin += kWeightRows) {
    const int64_t stop = end - begin < kWeightRows ? end : begin + kWeightRows;
    int64_t row = 0;
    for (; row + 2 <= p.rows; row += 2) multiply_rows<2, W, Y>(p, row, begin, stop);
    if (row < p.rows) multiply_rows<1, W, Y>(p, row, begin, stop);
  }
}

}  // namespace

void linear(const LinearParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using W = decltype(type);
    if (p.y_dtype == p.dtype) {
      multiply<W, W>(p, begin, end);
    } else {
      multiply<W, Accumulator<W>>(p, begin, end);
    }
  });
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
