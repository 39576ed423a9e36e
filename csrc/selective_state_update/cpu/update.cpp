// SPDX-License-Identifier: Apache-2.0
//
// Lanes are channels where there is one value a channel, and states where one channel's states,
// which are contiguous, are advanced.
#include "common/cpu/simd.h"
#include "selective_state_update/cpu/kernels.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {
namespace {

// `count` channels from c of row b, no more than there are lanes.
template <class T, class S>
void update_channels(const SelectiveStateUpdateParams& p, int64_t state_row, int64_t b, int64_t c,
                     int64_t count) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  constexpr A log2e = A(1.4426950408889634);
  const auto parameter = [&](const void* data) {
    return data == nullptr ? V{} : load_converted<A>(static_cast<const A*>(data) + c, 1, count);
  };
  const auto input = [&](const InputView& tensor) {
    const T* row = static_cast<const T*>(tensor.data) + b * tensor.batch + c * tensor.channel;
    return load_converted<A>(row, tensor.channel, count);
  };
  T* y = static_cast<T*>(p.y.data) + b * p.y.batch + c;
  if (state_row < 0) {
    store_converted(y, 1, V{}, count);
    return;
  }
  S* state = static_cast<S*>(p.state) + state_row * p.state_row + c * p.state_channel;
  const A* A_row = static_cast<const A*>(p.A.data) + c * p.d_state;
  const V u = input(p.u), biased = input(p.delta) + parameter(p.delta_bias.data);
  const V dt = p.delta_softplus ? softplus(biased) : biased;
  const V dt_log2e = dt * log2e, dt_u = dt * u;
  // Of their own, since a store to the state might else change them.
  const int64_t d_state = p.d_state, state_stride = p.state_stride, state_channel = p.state_channel,
                B_stride = p.B.state, C_stride = p.C.state, groups = p.groups,
                per_group = p.channels / groups;
  const T *B = static_cast<const T*>(p.B.data) + b * p.B.batch,
          *C = static_cast<const T*>(p.C.data) + b * p.C.batch;
  A sums[lanes * lanes]{};
  for (int64_t lane = 0; lane < count; ++lane, state += state_channel, A_row += d_state) {
    const int64_t group = groups == 1 ? 0 : (c + lane) / per_group;
    const T *B_row = B + group * p.B.group, *C_row = C + group * p.C.group;
    V sum{};
    for (int64_t n = 0; n < d_state; n += lanes) {
      const int64_t rest = d_state - n < lanes ? d_state - n : lanes;
      S* at = state + n * state_stride;
      const V decay = exp2(V(load_converted<A>(A_row + n, 1, rest) * dt_log2e[lane]));
      const V B_values = load_converted<A>(B_row + n * B_stride, B_stride, rest);
      const V h = decay * load_converted<A>(at, state_stride, rest) + B_values * dt_u[lane];
      sum += h * load_converted<A>(C_row + n * C_stride, C_stride, rest);
      store_converted(at, state_stride, h, rest);
    }
    store_vector(sums + lane * lanes, sum);
  }
  V out = sums_of_vectors<V>(sums, lanes) + parameter(p.D.data) * u;
  if (p.z.data != nullptr) out *= silu(input(p.z));
  store_converted(y, 1, out, count);
}

}  // namespace

void selective_state_update(const SelectiveStateUpdateParams& p, const int64_t* state_rows,
                            int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    dispatch_dtype(p.state_dtype, [&](auto state_type) {
      using T = decltype(type);
      const auto update = [&](int64_t b, int64_t c, int64_t count) {
        update_channels<T, decltype(state_type)>(p, state_rows[b], b, c, count);
      };
      for_each_vector<Accumulator<T>>(begin, end, p.channels, update);
    });
  });
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
