// SPDX-License-Identifier: Apache-2.0
//
// Lanes are states: one channel's states lie side by side.
#include "../common/simd.h"
#include "params.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {
namespace {

template <class T, class S>
void update_rows(const SelectiveStateUpdateParams& p, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  constexpr A log2e = A(1.4426950408889634);
  const auto parameter = [](const void* data, int64_t at) {
    return data == nullptr ? A(0) : static_cast<const A*>(data)[at];
  };
  const auto input = [](const Strided3& tensor, int64_t b, int64_t c) {
    return A(
        to_accumulator(static_cast<const T*>(tensor.data)[b * tensor.batch + c * tensor.channel]));
  };
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.channels, c = row % p.channels;
    T* y = static_cast<T*>(p.y.data) + b * p.y.batch + c;
    const int64_t state_row = p.state_rows[b];
    if (state_row < 0) {
      *y = from_accumulator<T>(A(0));
      continue;
    }
    S* state = static_cast<S*>(p.state) + state_row * p.state_row + c * p.state_channel;
    const int64_t group = c / (p.channels / p.groups);
    const T* B = static_cast<const T*>(p.B.data) + b * p.B.batch + group * p.B.group;
    const T* C = static_cast<const T*>(p.C.data) + b * p.C.batch + group * p.C.group;
    const A* A_row = static_cast<const A*>(p.A) + c * p.d_state;
    const A u = input(p.u, b, c);
    A dt = input(p.delta, b, c) + parameter(p.delta_bias, c);
    if (p.delta_softplus) dt = softplus(dt);
    V sum{};
    for (int64_t n = 0; n < p.d_state; n += lanes) {
      const int rest = p.d_state - n < lanes ? int(p.d_state - n) : lanes;
      V h{}, A_values{}, B_values{}, C_values{};
      for (int lane = 0; lane < rest; ++lane) {
        h[lane] = to_accumulator(state[(n + lane) * p.state_stride]);
        A_values[lane] = A_row[n + lane];
        B_values[lane] = to_accumulator(B[(n + lane) * p.B.state]);
        C_values[lane] = to_accumulator(C[(n + lane) * p.C.state]);
      }
      h = exp2(V(A_values * (dt * log2e))) * h + B_values * (dt * u);
      sum += h * C_values;
      for (int lane = 0; lane < rest; ++lane) {
        state[(n + lane) * p.state_stride] = from_accumulator<S>(h[lane]);
      }
    }
    A out = sum_lanes(sum) + parameter(p.D, c) * u;
    if (p.z.data != nullptr) out *= silu(input(p.z, b, c));
    *y = from_accumulator<T>(out);
  }
}

}  // namespace

void selective_state_update(const SelectiveStateUpdateParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    dispatch_dtype(p.state_dtype, [&](auto state_type) {
      update_rows<decltype(type), decltype(state_type)>(p, begin, end);
    });
  });
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
