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

// Parts of the weight that a thread reads side by side, each a linear stream: one alone leaves the
// processor waiting for memory.
constexpr int kStreams = 4;

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

// sums[s][r] = x_r . weight_s, for `Rows` rows of x and `Streams` rows of the weight, which lie
// `stream` elements apart.
template <int Rows, int Streams, class W>
[[gnu::always_inline]] inline void dot_products(const Accumulator<W>* x, int64_t x_row,
                                                const W* weight, int64_t stream, int64_t size,
                                                Accumulator<W> (&sums)[Streams][Rows]) {
  using A = Accumulator<W>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>, parts = kLanesOfSum / lanes;
  V partial[Streams][Rows][parts]{};
  int64_t k = 0;
  for (; k + kLanesOfSum <= size; k += kLanesOfSum) {
    for (int part = 0; part < parts; ++part) {
      const int64_t at = k + part * lanes;
      V inputs[Rows];
      for (int r = 0; r < Rows; ++r) inputs[r] = load_vector<V>(x + r * x_row + at);
      for (int s = 0; s < Streams; ++s) {
        const V values = load_whole<V>(weight + s * stream + at);
        for (int r = 0; r < Rows; ++r) partial[s][r][part] += values * inputs[r];
      }
    }
  }
  for (int part = 0; part < parts; ++part) {
    const int64_t at = k + part * lanes, rest = size - at;
    if (rest <= 0) break;
    const int64_t count = rest < lanes ? rest : lanes;
    for (int s = 0; s < Streams; ++s) {
      const V values = load_converted<A>(weight + s * stream + at, 1, count);
      for (int r = 0; r < Rows; ++r) {
        partial[s][r][part] += values * load_converted<A>(x + r * x_row + at, 1, count);
      }
    }
  }
  for (int s = 0; s < Streams; ++s) {
    for (int r = 0; r < Rows; ++r) sums[s][r] = sum_parts(partial[s][r]);
  }
}

// `Rows` rows of x from the first-th on, with the rows [begin, end) of the weight and those
// `distance`, 2 * distance, ... after them.
template <int Rows, int Streams, class W, class Y>
void multiply_rows(const LinearParams& p, int64_t first, int64_t begin, int64_t end,
                   int64_t distance) {
  using A = Accumulator<W>;
  const A* x = static_cast<const A*>(p.x) + first * p.x_row;
  const A* bias = static_cast<const A*>(p.bias);
  Y* y = static_cast<Y*>(p.y) + first * p.y_row;
  for (int64_t row = begin; row < end; ++row) {
    A sums[Streams][Rows];
    dot_products<Rows>(x, p.x_row, static_cast<const W*>(p.weight) + row * p.weight_row,
                       distance * p.weight_row, p.in_features, sums);
    for (int s = 0; s < Streams; ++s) {
      const int64_t n = row + s * distance;
      for (int r = 0; r < Rows; ++r) {
        const A sum = bias == nullptr ? sums[s][r] : sums[s][r] + bias[n];
        y[r * p.y_row + n] = from_accumulator<Y>(sum);
      }
    }
  }
}

// The rows [begin, end) of the weight, in `Streams` equal parts and a rest.
template <int Rows, int Streams, class W, class Y>
void multiply_streams(const LinearParams& p, int64_t begin, int64_t end) {
  const int64_t distance = (end - begin) / Streams, stop = begin + distance;
  for (int64_t row = begin; row < stop; row += kWeightRows / Streams) {
    const int64_t last = stop - row < kWeightRows / Streams ? stop : row + kWeightRows / Streams;
    int64_t first = 0;
    for (; first + Rows <= p.rows; first += Rows) {
      multiply_rows<Rows, Streams, W, Y>(p, first, row, last, distance);
    }
    for (; first < p.rows; ++first) {
      multiply_rows<1, Streams, W, Y>(p, first, row, last, distance);
    }
  }
  if constexpr (Streams > 1) {
    multiply_streams<Rows, 1, W, Y>(p, begin + Streams * distance, end);
  }
}

template <class W, class Y>
void multiply(const LinearParams& p, int64_t begin, int64_t end) {
  if (p.rows == 1) {
    multiply_streams<1, kStreams, W, Y>(p, begin, end);
  } else {
    multiply_streams<2, kStreams, W, Y>(p, begin, end);
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
