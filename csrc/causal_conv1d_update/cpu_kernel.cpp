// SPDX-License-Identifier: Apache-2.0
#include "../common/simd.h"
#include "params.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {
namespace {

template <class T, class S>
void update_rows(const CausalConv1dUpdateParams& p, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const A *weight = static_cast<const A*>(p.weight), *bias = static_cast<const A*>(p.bias);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.channels, c = row % p.channels;
    T* y = static_cast<T*>(p.y.data) + b * p.y.batch + c;
    const int64_t state_row = p.state_rows[b];
    if (state_row < 0) {
      *y = from_accumulator<T>(A(0));
      continue;
    }
    S* state = static_cast<S*>(p.state) + state_row * p.state_row + c * p.state_channel;
    const A x = to_accumulator(static_cast<const T*>(p.x.data)[b * p.x.batch + c * p.x.channel]);
    A sum = bias == nullptr ? A(0) : bias[c];
    for (int64_t tap = 0; tap + 1 < p.width; ++tap) {
      sum += weight[tap * p.channels + c] * to_accumulator(state[tap * p.state_step]);
    }
    sum += weight[(p.width - 1) * p.channels + c] * x;
    for (int64_t tap = 0; tap + 2 < p.width; ++tap) {
      state[tap * p.state_step] = state[(tap + 1) * p.state_step];
    }
    if (p.width > 1) state[(p.width - 2) * p.state_step] = from_accumulator<S>(x);
    *y = from_accumulator<T>(p.silu ? silu(sum) : sum);
  }
}

}  // namespace

void causal_conv1d_update(const CausalConv1dUpdateParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    dispatch_dtype(p.state_dtype, [&](auto state_type) {
      update_rows<decltype(type), decltype(state_type)>(p, begin, end);
    });
  });
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
