// SPDX-License-Identifier: Apache-2.0
//
// Lanes are channels.
#include "causal_conv1d_update/cpu/kernels.h"
#include "common/cpu/simd.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {
namespace {

// `count` channels from c of row b, no more than there are lanes.
template <class T, class S>
void update_channels(const CausalConv1dUpdateParams& p, int64_t state_row, int64_t b, int64_t c,
                     int64_t count) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  T* y = static_cast<T*>(p.y.data) + b * p.y.batch + c;
  if (state_row < 0) {
    store_converted(y, 1, V{}, count);
    return;
  }
  S* state = static_cast<S*>(p.state) + state_row * p.state_row + c * p.state_channel;
  const A* weight = static_cast<const A*>(p.weight.data) + c * p.width;
  const V x = load_converted<A>(static_cast<const T*>(p.x.data) + b * p.x.batch + c * p.x.channel,
                                p.x.channel, count);
  V sum{};
  if (p.bias.data != nullptr)
    sum = load_converted<A>(static_cast<const A*>(p.bias.data) + c, 1, count);
  for (int64_t tap = 0; tap + 1 < p.width; ++tap, state += p.state_step) {
    const V input = load_converted<A>(state, p.state_channel, count);
    sum += load_converted<A>(weight + tap, p.width, count) * input;
    const bool newest = tap + 2 == p.width;
    // In its own type, an older input keeps its bits.
    for (int64_t lane = 0; lane < count && !newest; ++lane) {
      state[lane * p.state_channel] = state[p.state_step + lane * p.state_channel];
    }
    if (newest) store_converted(state, p.state_channel, x, count);
  }
  sum += load_converted<A>(weight + p.width - 1, p.width, count) * x;
  store_converted(y, 1, p.silu ? silu(sum) : sum, count);
}

}  // namespace

void causal_conv1d_update(const CausalConv1dUpdateParams& p, const int64_t* state_rows,
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
