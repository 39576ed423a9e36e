// SPDX-License-Identifier: Apache-2.0
#include "causal_conv1d/cpu/item.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {
namespace {

template <class T>
using Item = ConvItem<T, CausalConv1dBackward>;

// Scratch memory: rows of x and dy, dpre, the gradient before the SiLU, with W-1 rows around the
// segment's, and the sums of dweight, with those of dbias in row W.
template <class A>
struct BackwardTiles {
  A *x, *dy, *dpre, *sums;
};

// dpre of steps [begin, end). Where these are the segment's own, also what they add to
// dweight_w = sum_t dpre_t x_{t-W+1+w} and dbias = sum_t dpre_t.
template <bool Own, class T, class Width>
void output_gradient(const Item<T>& item, Width width, Rows<Accumulator<T>> x,
                     Rows<Accumulator<T>> dy, int64_t begin, int64_t end, Accumulator<T>* dpre,
                     Accumulator<T>* sums) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  constexpr int64_t stride = Item<T>::stride;
  const CausalConv1dBackward& p = item.p;
  const Rows<A> weight = item.weight;
  const auto x_ahead = item.ahead(p.x), dy_ahead = item.ahead(p.dy);
  const A* bias = item.bias;
  const bool with_silu = p.silu;
  for_each_vector_of_steps<A>(
      begin, end, item.channels,
      [&]<int Steps>(int64_t step, int64_t c, int64_t) __attribute__((always_inline)) {
        V gradients[Steps], pre[Steps];
        for (V& sum : pre) sum = load_vector<V>(bias + c);
        for (int i = 0; i < Steps; ++i) gradients[i] = load_vector<V>(dy.row(step + i) + c);
        if constexpr (Own) {
          x_ahead.template prefetch<Steps>(step, c);
          dy_ahead.template prefetch<Steps>(step, c);
        }
        if (with_silu) {
          add_window(pre, x.at(step, c), weight.at(0, c), width);
          for (V& value : pre) value = silu_derivative(value, sigmoid(value));
          for (int i = 0; i < Steps; ++i) gradients[i] *= pre[i];
        }
        for (int i = 0; i < Steps; ++i) store_vector(dpre + (step + i) * stride + c, gradients[i]);
        if (!Own) return;
        for (int64_t tap = 0; tap < width; ++tap) {
          V sum = load_vector<V>(sums + tap * stride + c);
          for (int i = 0; i < Steps; ++i) {
            sum += gradients[i] * load_vector<V>(x.row(step + i + tap) + c);
          }
          store_vector(sums + tap * stride + c, sum);
        }
        V sum = load_vector<V>(sums + width * stride + c);
        for (const V& gradient : gradients) sum += gradient;
        store_vector(sums + width * stride + c, sum);
      });
}

// dx_t = sum_w weight_w dpre_{t+W-1-w}, and where the sequence begins the gradient of the W-1
// inputs before it.
template <class T, class Width>
void input_gradient(const Item<T>& item, Width width, const Accumulator<T>* dpre) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  const CausalConv1dBackward& p = item.p;
  const Segment& segment = item.segment;
  const int64_t around = width - 1;
  const Rows<A> weight{item.weight.row(around), -item.weight.stride}, rows{dpre, item.stride};
  // Inputs among the sequence's last W-1, the initial state's included, are in the final state.
  const int64_t kept = segment.sequence_end - segment.begin - around;
  const Rows<A> final_state = item.state(p.dfinal_state);
  const auto gradient_into = [&](const auto& output, int64_t begin, int64_t end) {
    for_each_vector_of_steps<A>(
        begin, end, item.channels,
        [&]<int Steps>(int64_t step, int64_t c, int64_t count) __attribute__((always_inline)) {
          V sums[Steps]{};
          add_window(sums, rows.at(step, c), weight.at(0, c), width);
          if (Steps == 1 && step >= kept && final_state.first != nullptr) {
            sums[0] += load_converted<A>(final_state.row(step - kept) + c, 1, count);
          }
          output.store(step, c, sums, count);
        });
  };
  const OutputRows<T> dx = item.output(p.dx);
  int64_t step = kept < 0 ? 0 : kept < item.steps ? kept : item.steps;
  gradient_into(dx, 0, step);
  for (; step < item.steps; ++step) gradient_into(dx, step, step + 1);
  if (!segment.starts() || p.dinitial_state == nullptr) return;
  A* after_state = static_cast<A*>(p.dinitial_state) + item.state_offset(around);
  const OutputRows<A> dinitial_state{after_state, p.channels, false, {}};
  for (step = -around; step < 0; ++step) gradient_into(dinitial_state, step, step + 1);
}

// Rows of x and dy reach W-1 steps past the segment's end, for dx.
template <class T, class Width>
void backward_segment(const Item<T>& item, Width width,
                      const BackwardTiles<Accumulator<T>>& tiles) {
  using A = Accumulator<T>;
  constexpr int64_t stride = Item<T>::stride;
  const CausalConv1dBackward& p = item.p;
  const Segment& segment = item.segment;
  const int64_t around = width - 1, rest = segment.sequence_end - segment.end;
  const int64_t after = rest < around ? rest : around, rows = item.steps + after;
  const auto x = item.inputs(segment.begin - around, segment.end + after, tiles.x);
  const auto dy = item.rows_of(p.dy, segment.begin, segment.end + after, tiles.dy);
  // No gradient flows from before the sequence's begin or after its end; other segments give
  // theirs.
  A* own = tiles.dpre + around * stride;
  for (A* value = tiles.dpre; value < own; ++value) *value = 0;
  for (A* value = own + rows * stride; value < own + (item.steps + around) * stride; ++value) {
    *value = 0;
  }
  output_gradient<true>(item, width, x, dy, 0, item.steps, own, tiles.sums);
  output_gradient<false>(item, width, x, dy, item.steps, rows, own, tiles.sums);
  input_gradient(item, width, own);
}

template <class T>
void backward_item(Item<T> item, const BackwardTiles<Accumulator<T>>& tiles) {
  using A = Accumulator<T>;
  constexpr int64_t stride = Item<T>::stride;
  const CausalConv1dBackward& p = item.p;
  for (int64_t i = 0; i < item.parameters_size(p); ++i) tiles.sums[i] = 0;
  for (int64_t i = 0; item.next_segment(i); ++i) {
    // A width known beforehand saves the loops over taps.
    if (p.width == 4) {
      backward_segment(item, std::integral_constant<int64_t, 4>(), tiles);
    } else {
      backward_segment(item, p.width, tiles);
    }
  }
  const int64_t first = item.chunk * p.channels + item.channel;
  for (int64_t c = 0; c < item.channels; ++c) {
    for (int64_t tap = 0; tap < p.width; ++tap) {
      static_cast<A*>(p.dweight_partial)[(first + c) * p.width + tap] =
          tiles.sums[tap * stride + c];
    }
  }
  store_row(static_cast<A*>(p.dbias_partial) + first, item.channels, tiles.sums + p.width * stride,
            item.lanes);
}

}  // namespace

void causal_conv1d_backward(const CausalConv1dBackward& p, RowSegments segments, int64_t begin,
                            int64_t end) {
  for_each_conv_item(p, segments, begin, end, 3, [](auto item, auto& scratch) {
    const int64_t tile = item.tile_size(item.p), sums = item.parameters_size(item.p);
    const BackwardTiles<typename decltype(item)::A> tiles{scratch.take(tile), scratch.take(tile),
                                                          scratch.take(tile), scratch.take(sums)};
    backward_item(item, tiles);
  });
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
