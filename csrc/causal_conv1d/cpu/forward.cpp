// SPDX-License-Identifier: Apache-2.0
#include "causal_conv1d/cpu/item.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {
namespace {

template <class T>
void forward_segment(const ConvItem<T, CausalConv1dForward>& item, Accumulator<T>* tile) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  const CausalConv1dForward& p = item.p;
  const Segment& segment = item.segment;
  const int64_t before = p.width - 1;
  const Rows<A> x = item.inputs(segment.begin - before, segment.end, tile), weight = item.weight;
  const Ahead<T, Access::kRead> x_ahead = item.ahead(p.x);
  const OutputRows<T> y = item.output(p.y);
  const A* bias = item.bias;
  const int64_t width = p.width;
  const bool with_silu = p.silu;
  const auto work = [&]<int Steps>(auto step, auto c, auto count) __attribute__((always_inline)) {
    V sums[Steps];
    for (V& sum : sums) sum = load_vector<V>(bias + c);
    add_window(sums, x.at(step, c), weight.at(0, c), width);
    x_ahead.template prefetch<Steps>(step, c);
    if (with_silu) {
      for (V& sum : sums) sum = silu(sum);
    }
    y.store(step, c, sums, count);
  };
  for_each_vector_of_steps<A>(0, item.steps, item.channels, work);
  if (!segment.ends()) return;
  for (int64_t row = 0; row < before; ++row) {
    store_row(static_cast<A*>(p.final_state) + item.state_offset(row), item.channels,
              x.row(item.steps + row), item.lanes);
  }
}

}  // namespace

void causal_conv1d_forward(const CausalConv1dForward& p, RowSegments segments, int64_t begin,
                           int64_t end) {
  for_each_conv_item(p, segments, begin, end, 1, [](auto item, auto& scratch) {
    auto* tile = scratch.take(item.tile_size(item.p));
    for (int64_t i = 0; item.next_segment(i); ++i) forward_segment(item, tile);
  });
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
