// SPDX-License-Identifier: Apache-2.0
//
// A work item is one segment of time of a block of channels of one row of the batch. Its inputs are
// first brought into a tile of the accumulator's type, with the W-1 steps around them; lanes are
// channels.
#include "../common/simd.h"
#include "params.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {
namespace {

template <class T>
class Item {
 public:
  using A = Accumulator<T>;
  using V = Vector<A>;
  static constexpr int lanes = kLanes<A>;

  Item(const CausalConv1dParams& p, int64_t index)
      : p(p),
        segment_index(index / causal_conv1d_blocks(p) % p.segment_count),
        batch(index / causal_conv1d_blocks(p) / p.segment_count),
        segment(p.segments[segment_index]),
        channel(index % causal_conv1d_blocks(p) * kConvChannelBlock),
        channels(p.channels - channel < kConvChannelBlock ? p.channels - channel
                                                          : kConvChannelBlock),
        columns((channels + lanes - 1) / lanes),
        state_row((batch * p.sequences + segment.sequence) * (p.width - 1)) {}

  // Row `t` of the inputs, counted in the whole row: x, or the initial state before the sequence.
  void load_input(int64_t t, A* tile, int64_t capacity) const {
    if (t >= segment.sequence_begin) {
      load_tile<T>(p.x, batch, t, 1, channel, channels, tile, capacity);
    } else {
      load_state(p.initial_state, t - segment.sequence_begin + p.width - 1, tile, capacity);
    }
  }

  // Row `row` of this sequence's state; absent is 0.
  void load_state(const void* state, int64_t row, A* tile, int64_t capacity) const {
    if (state == nullptr) {
      for (int64_t column = 0; column < columns; ++column) {
        store_vector(tile + column * capacity * lanes, V{});
      }
    } else {
      load_row(static_cast<const A*>(state) + (state_row + row) * p.channels + channel, 1, channels,
               tile, capacity);
    }
  }

  void store_state(void* state, int64_t row, const A* tile, int64_t capacity) const {
    store_row(static_cast<A*>(state) + (state_row + row) * p.channels + channel, channels, tile,
              capacity);
  }

  // A row of (rows, D) of the parameters or partial sums.
  V load_parameter(const void* source, int64_t row, int64_t column) const {
    V v{};
    if (source != nullptr) {
      const A* from = static_cast<const A*>(source) + row * p.channels + channel + column * lanes;
      const int64_t rest = channels - column * lanes;
      if (rest >= lanes) {
        v = load_vector<V>(from);
      } else {
        for (int64_t lane = 0; lane < rest; ++lane) v[lane] = from[lane];
      }
    }
    return v;
  }

  void store_sum(void* target, int64_t row, int64_t column, V v) const {
    A* to = static_cast<A*>(target) + row * p.channels + channel + column * lanes;
    const int64_t rest = channels - column * lanes;
    if (rest >= lanes) {
      store_vector(to, v);
    } else {
      for (int64_t lane = 0; lane < rest; ++lane) to[lane] = v[lane];
    }
  }

  const CausalConv1dParams& p;
  int64_t segment_index, batch;
  const Segment& segment;
  int64_t channel, channels, columns, state_row;
};

// The convolution's output at the tile's row `row`, whose last tap is the input at `row` + W - 1.
template <int Width, class V>
[[gnu::always_inline]] inline V convolve(const ScalarOf<V>* x, const V* weight, int64_t width,
                                         V sum) {
  const int64_t taps = Width > 0 ? Width : width;
  for (int64_t tap = 0; tap < taps; ++tap) {
    sum += weight[tap] * load_vector<V>(x + tap * VectorTraits<V>::lanes);
  }
  return sum;
}

template <int Width, class T>
void forward_columns(const Item<T>& item, const Accumulator<T>* x, Accumulator<T>* y,
                     int64_t capacity, Vector<Accumulator<T>>* weight) {
  using V = typename Item<T>::V;
  constexpr int lanes = Item<T>::lanes;
  const CausalConv1dParams& p = item.p;
  const int64_t steps = item.segment.end - item.segment.begin;
  for (int64_t column = 0; column < item.columns; ++column) {
    V fixed[Width > 0 ? Width : 1];
    V* w = Width > 0 ? fixed : weight;
    for (int64_t tap = 0; tap < p.width; ++tap) {
      w[tap] = item.load_parameter(p.weight, tap, column);
    }
    const V bias = item.load_parameter(p.bias, 0, column);
    for (int64_t step = 0; step < steps; ++step) {
      V sum = convolve<Width>(x + (column * capacity + step) * lanes, w, p.width, bias);
      if (p.silu) sum = silu(sum);
      store_vector(y + (column * kTimeTile + step) * lanes, sum);
    }
  }
}

template <class T>
void forward_item(const Item<T>& item, Scratch<Accumulator<T>>& scratch) {
  using A = Accumulator<T>;
  constexpr int lanes = kLanes<A>;
  const CausalConv1dParams& p = item.p;
  const Segment& segment = item.segment;
  const int64_t steps = segment.end - segment.begin, before = p.width - 1;
  const int64_t capacity = kTimeTile + before;
  A* x = scratch.take(capacity * kConvChannelBlock);
  A* y = scratch.take(kTimeTile * kConvChannelBlock);
  auto* weight = reinterpret_cast<Vector<A>*>(scratch.take(p.width * lanes));
  for (int64_t row = 0; row < before; ++row) {
    item.load_input(segment.begin - before + row, x + row * lanes, capacity);
  }
  load_tile<T>(p.x, item.batch, segment.begin, steps, item.channel, item.channels,
               x + before * lanes, capacity);
  if (p.width == 4) {
    forward_columns<4>(item, x, y, capacity, weight);
  } else {
    forward_columns<0>(item, x, y, capacity, weight);
  }
  store_tile<T>(p.y, item.batch, segment.begin, steps, item.channel, item.channels, y, kTimeTile);
  if (segment.ends()) {
    for (int64_t row = 0; row < before; ++row) {
      item.store_state(p.final_state, row, x + (steps + row) * lanes, capacity);
    }
  }
}

// dx at step t sums weight[tap] dpre at t + W-1-tap, dpre being the gradient before the SiLU; so
// the tile of dpre reaches W-1 steps past the segment's end.
template <class T>
void backward_item(const Item<T>& item, Scratch<Accumulator<T>>& scratch) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  const CausalConv1dParams& p = item.p;
  const Segment& segment = item.segment;
  const int64_t width = p.width, around = width - 1;
  const int64_t capacity = kTimeTile + 2 * around;
  A* x = scratch.take(capacity * kConvChannelBlock);
  A* dpre = scratch.take(capacity * kConvChannelBlock);
  A* dx = scratch.take(capacity * kConvChannelBlock);
  A* dstate = scratch.take(capacity * kConvChannelBlock);
  auto* weight = reinterpret_cast<V*>(scratch.take(width * lanes));
  auto* dweight = reinterpret_cast<V*>(scratch.take(width * lanes));
  const int64_t steps = segment.end - segment.begin;
  const int64_t after =
      segment.sequence_end - segment.end < around ? segment.sequence_end - segment.end : around;
  // A segment that begins its sequence also gives the gradient of the W-1 inputs before it.
  const int64_t before = segment.starts() ? around : 0;
  for (int64_t row = 0; row < around + steps + after; ++row) {
    item.load_input(segment.begin - around + row, x + row * lanes, capacity);
  }
  load_tile<T>(p.dy, item.batch, segment.begin, steps + after, item.channel, item.channels,
               dpre + around * lanes, capacity);
  // Inputs among the sequence's last W-1, the initial state's included, are in the final state.
  for (int64_t row = 0; row < before + steps; ++row) {
    const int64_t in_state = segment.begin - before + row - (segment.sequence_end - around);
    item.load_state(in_state >= 0 ? p.dfinal_state : nullptr, in_state, dstate + row * lanes,
                    capacity);
  }
  const int64_t partial_row = item.batch * p.segment_count + item.segment_index;
  for (int64_t column = 0; column < item.columns; ++column) {
    const int64_t first = column * capacity * lanes;
    const V bias = item.load_parameter(p.bias, 0, column);
    V dbias{};
    for (int64_t tap = 0; tap < width; ++tap) {
      weight[tap] = item.load_parameter(p.weight, tap, column);
      dweight[tap] = V{};
    }
    for (int64_t row = 0; row < around; ++row) store_vector(dpre + first + row * lanes, V{});
    for (int64_t row = steps + around + after; row < steps + 2 * around; ++row) {
      store_vector(dpre + first + row * lanes, V{});
    }
    for (int64_t step = 0; step < steps + after; ++step) {
      A* at = dpre + first + (around + step) * lanes;
      const A* taps = x + first + step * lanes;
      V gradient = load_vector<V>(at);
      if (p.silu) {
        const V pre = convolve<0>(taps, weight, width, bias);
        gradient *= silu_derivative(pre, sigmoid(pre));
        store_vector(at, gradient);
      }
      if (step < steps) {
        dbias += gradient;
        for (int64_t tap = 0; tap < width; ++tap) {
          dweight[tap] += gradient * load_vector<V>(taps + tap * lanes);
        }
      }
    }
    for (int64_t row = 0; row < before + steps; ++row) {
      V sum = load_vector<V>(dstate + first + row * lanes);
      const A* gradients = dpre + first + (around - before + row) * lanes;
      for (int64_t tap = 0; tap < width; ++tap) {
        sum += weight[tap] * load_vector<V>(gradients + (around - tap) * lanes);
      }
      store_vector(dx + first + row * lanes, sum);
    }
    for (int64_t tap = 0; tap < width; ++tap) {
      item.store_sum(p.dweight_partial, partial_row * width + tap, column, dweight[tap]);
    }
    item.store_sum(p.dbias_partial, partial_row, column, dbias);
  }
  store_tile<T>(p.dx, item.batch, segment.begin, steps, item.channel, item.channels,
                dx + before * lanes, capacity);
  if (segment.starts() && p.dinitial_state != nullptr) {
    for (int64_t row = 0; row < around; ++row) {
      item.store_state(p.dinitial_state, row, dx + row * lanes, capacity);
    }
  }
}

}  // namespace

void causal_conv1d_forward(const CausalConv1dParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using A = Accumulator<decltype(type)>;
    const int64_t size = (2 * kTimeTile + p.width - 1) * kConvChannelBlock + p.width * kLanes<A>;
    Scratch<A> scratch(size);
    for (int64_t index = begin; index < end; ++index) {
      forward_item(Item<decltype(type)>(p, index), scratch);
      scratch.take_all_back();
    }
  });
}

void causal_conv1d_backward(const CausalConv1dParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using A = Accumulator<decltype(type)>;
    const int64_t capacity = kTimeTile + 2 * (p.width - 1);
    const int64_t size = 4 * capacity * kConvChannelBlock + 2 * p.width * kLanes<A>;
    Scratch<A> scratch(size);
    for (int64_t index = begin; index < end; ++index) {
      backward_item(Item<decltype(type)>(p, index), scratch);
      scratch.take_all_back();
    }
  });
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
