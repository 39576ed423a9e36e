// SPDX-License-Identifier: Apache-2.0
//
// A work item is one segment of time of a block of channels of one row of the batch. Its inputs and
// the W-1 steps around them are first brought into rows of the accumulator's type; lanes are
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
  // Of a row in the kernel's own memory; no power of two, so that rows spread over the cache.
  static constexpr int64_t stride = kConvChannelBlock + 16;
  static constexpr TileStrides strides{lanes, stride};

  // Room for the widest item's rows, `tiles` of them, and the parameters.
  static int64_t scratch_size(const CausalConv1dParams& p, int64_t tiles) {
    return stride * (tiles * (kTimeTile + 3 * (p.width - 1)) + p.width + 2);
  }

  Item(const CausalConv1dParams& p, int64_t index, Scratch<A>& scratch)
      : p(p),
        segment_index(index / causal_conv1d_blocks(p) % p.segment_count),
        batch(index / causal_conv1d_blocks(p) / p.segment_count),
        segment(p.segments[segment_index]),
        channel(index % causal_conv1d_blocks(p) * kConvChannelBlock),
        channels(p.channels - channel < kConvChannelBlock ? p.channels - channel
                                                          : kConvChannelBlock),
        state_row((batch * p.sequences + segment.sequence) * (p.width - 1)),
        steps(segment.end - segment.begin) {
    weight = scratch.take(p.width * stride);
    bias = scratch.take(stride);
    for (int64_t tap = 0; tap < p.width; ++tap) {
      load_row(static_cast<const A*>(p.weight) + tap * p.channels + channel, 1, channels,
               weight + tap * stride, lanes);
    }
    load_state(p.bias, channel, bias);
  }

  // Inputs [begin, end) of the whole row: x, or the initial state before the sequence.
  void load_inputs(int64_t begin, int64_t end, A* rows) const {
    for (; begin < segment.sequence_begin && begin < end; ++begin, rows += stride) {
      const int64_t row = begin - segment.sequence_begin + p.width - 1;
      load_state(p.initial_state, state_offset(row), rows);
    }
    load_tile<T>(p.x, batch, begin, end - begin, channel, channels, rows, strides);
  }

  // Where this block's channels of a row of this sequence's state begin.
  int64_t state_offset(int64_t row) const { return (state_row + row) * p.channels + channel; }

  // Absent is 0.
  void load_state(const void* state, int64_t offset, A* row) const {
    if (state == nullptr) {
      for (int64_t c = 0; c < channels; c += lanes) store_vector(row + c, V{});
    } else {
      load_row(static_cast<const A*>(state) + offset, 1, channels, row, lanes);
    }
  }

  void store_state(void* state, int64_t row, const A* source) const {
    store_row(static_cast<A*>(state) + state_offset(row), channels, source, lanes);
  }

  // bias + sum_w weight_w x_w of the vector at `c`, the first of whose inputs is in the row at x.
  template <int Width>
  [[gnu::always_inline]] V convolve(const A* x, int64_t c) const {
    V sum = load_vector<V>(bias + c);
    const int64_t width = Width > 0 ? Width : p.width;
    for (int64_t tap = 0; tap < width; ++tap) {
      sum += load_vector<V>(weight + tap * stride + c) * load_vector<V>(x + tap * stride + c);
    }
    return sum;
  }

  const CausalConv1dParams& p;
  int64_t segment_index, batch;
  const Segment& segment;
  int64_t channel, channels, state_row, steps;
  A *weight, *bias;
};

template <int Width, class T>
void forward_item(const Item<T>& item, Scratch<Accumulator<T>>& scratch) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  constexpr int64_t stride = Item<T>::stride;
  const CausalConv1dParams& p = item.p;
  const Segment& segment = item.segment;
  const int64_t before = p.width - 1;
  A* x = scratch.take((item.steps + before) * stride);
  A* y = scratch.take(stride);
  item.load_inputs(segment.begin - before, segment.end, x);
  T* target = static_cast<T*>(p.y.data) + item.batch * p.y.batch + item.channel;
  for (int64_t step = 0; step < item.steps; ++step) {
    for (int64_t c = 0; c < item.channels; c += item.lanes) {
      const V sum = item.template convolve<Width>(x + step * stride, c);
      store_vector(y + c, p.silu ? silu(sum) : sum);
    }
    store_row(target + (segment.begin + step) * p.y.time, item.channels, y, item.lanes);
  }
  if (!segment.ends()) return;
  for (int64_t row = 0; row < before; ++row) {
    item.store_state(p.final_state, row, x + (item.steps + row) * stride);
  }
}

// Turns rows of dy into rows of dpre, the gradient before the SiLU.
template <int Width, class T>
void through_silu(const Item<T>& item, const Accumulator<T>* x, int64_t rows,
                  Accumulator<T>* dpre) {
  using V = typename Item<T>::V;
  for (int64_t row = 0; row < rows; ++row, x += item.stride, dpre += item.stride) {
    for (int64_t c = 0; c < item.channels; c += item.lanes) {
      const V pre = item.template convolve<Width>(x, c);
      store_vector(dpre + c, V(load_vector<V>(dpre + c) * silu_derivative(pre, sigmoid(pre))));
    }
  }
}

// The segment's partial sums: dweight_w = sum_t dpre_t x_{t-W+1+w}, dbias = sum_t dpre_t.
template <int Width, class T>
void store_parameter_sums(const Item<T>& item, const Accumulator<T>* x, const Accumulator<T>* dpre,
                          Accumulator<T>* sums) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  constexpr int64_t stride = Item<T>::stride;
  const CausalConv1dParams& p = item.p;
  const int64_t partial = item.batch * p.segment_count + item.segment_index;
  const auto store = [&](void* target, int64_t row, const A* source) {
    store_row(static_cast<A*>(target) + row * p.channels + item.channel, item.channels, source,
              item.lanes);
  };
  // As many taps at a time as Width, so that their sums stay in registers.
  constexpr int taps = Width > 0 ? Width : 1;
  for (int64_t tap = 0; tap < p.width; tap += taps) {
    for (int64_t c = 0; c < item.channels; c += item.lanes) {
      V dweight[taps]{};
      for (int64_t step = 0; step < item.steps; ++step) {
        const V gradient = load_vector<V>(dpre + step * stride + c);
        for (int i = 0; i < taps; ++i) {
          dweight[i] += gradient * load_vector<V>(x + (step + tap + i) * stride + c);
        }
      }
      for (int i = 0; i < taps; ++i) store_vector(sums + i * stride + c, dweight[i]);
    }
    for (int i = 0; i < taps; ++i) {
      store(p.dweight_partial, partial * p.width + tap + i, sums + i * stride);
    }
  }
  for (int64_t c = 0; c < item.channels; c += item.lanes) {
    V dbias{};
    for (int64_t step = 0; step < item.steps; ++step) {
      dbias += load_vector<V>(dpre + step * stride + c);
    }
    store_vector(sums + c, dbias);
  }
  store(p.dbias_partial, partial, sums);
}

// dx_t = sum_w weight_w dpre_{t+W-1-w}, so rows of dpre reach W-1 steps past the segment's end.
template <int Width, class T>
void backward_item(const Item<T>& item, Scratch<Accumulator<T>>& scratch) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  constexpr int64_t stride = Item<T>::stride;
  const CausalConv1dParams& p = item.p;
  const Segment& segment = item.segment;
  const int64_t around = p.width - 1, rest = segment.sequence_end - segment.end;
  const int64_t after = rest < around ? rest : around, rows = item.steps + after;
  A* x = scratch.take((around + rows) * stride);
  A* dpre = scratch.take((item.steps + 2 * around) * stride);
  A* sums = scratch.take(p.width * stride);
  A* dx = scratch.take(stride);
  item.load_inputs(segment.begin - around, segment.end + after, x);
  load_tile<T>(p.dy, item.batch, segment.begin, rows, item.channel, item.channels,
               dpre + around * stride, item.strides);
  if (p.silu) through_silu<Width>(item, x, rows, dpre + around * stride);
  store_parameter_sums<Width>(item, x, dpre + around * stride, sums);
  // No gradient flows from before the sequence's begin or after its end; other segments give
  // theirs.
  for (int64_t row = 0; row < around; ++row) item.load_state(nullptr, 0, dpre + row * stride);
  for (int64_t row = around + rows; row < item.steps + 2 * around; ++row) {
    item.load_state(nullptr, 0, dpre + row * stride);
  }
  // A segment that begins its sequence also gives the gradient of the W-1 inputs before it.
  T* target = static_cast<T*>(p.dx.data) + item.batch * p.dx.batch + item.channel;
  for (int64_t step = segment.starts() ? -around : 0; step < item.steps; ++step) {
    const int64_t t = segment.begin + step;
    // Inputs among the sequence's last W-1, the initial state's included, are in the final state.
    const int64_t in_state = t - (segment.sequence_end - around);
    item.load_state(in_state >= 0 ? p.dfinal_state : nullptr, item.state_offset(in_state), dx);
    const int64_t width = Width > 0 ? Width : p.width;
    for (int64_t c = 0; c < item.channels; c += item.lanes) {
      V sum = load_vector<V>(dx + c);
      for (int64_t tap = 0; tap < width; ++tap) {
        sum += load_vector<V>(item.weight + tap * stride + c) *
               load_vector<V>(dpre + (step + 2 * around - tap) * stride + c);
      }
      store_vector(dx + c, sum);
    }
    if (step >= 0) {
      store_row(target + t * p.dx.time, item.channels, dx, item.lanes);
    } else if (p.dinitial_state != nullptr) {
      item.store_state(p.dinitial_state, around + step, dx);
    }
  }
}

}  // namespace

void causal_conv1d_forward(const CausalConv1dParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    Scratch<Accumulator<T>> scratch(Item<T>::scratch_size(p, 1));
    for (int64_t index = begin; index < end; ++index) {
      const Item<T> item(p, index, scratch);
      p.width == 4 ? forward_item<4>(item, scratch) : forward_item<0>(item, scratch);
      scratch.take_all_back();
    }
  });
}

void causal_conv1d_backward(const CausalConv1dParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    Scratch<Accumulator<T>> scratch(Item<T>::scratch_size(p, 2) + p.width * Item<T>::stride);
    for (int64_t index = begin; index < end; ++index) {
      const Item<T> item(p, index, scratch);
      p.width == 4 ? backward_item<4>(item, scratch) : backward_item<0>(item, scratch);
      scratch.take_all_back();
    }
  });
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
