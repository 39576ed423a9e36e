// SPDX-License-Identifier: Apache-2.0
//
// A work item is a chunk of segments of time of a block of channels of one row of the batch. The
// inputs of each segment and the W-1 steps around them are first brought into rows of the
// accumulator's type; lanes are channels.
#include "../common/simd.h"
#include "params.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {
namespace {

struct Place {
  int64_t chunk, block;  // chunks are counted through the whole batch
};

// Consecutive work items are neighbours in memory: by channels, or by time where steps lie nearer.
Place place_of(const CausalConv1dParams& p, int64_t index) {
  const int64_t blocks = causal_conv1d_blocks(p), chunks = causal_conv1d_chunks(p);
  if (p.x.channel == 1) return {index / blocks, index % blocks};
  return {index / (blocks * chunks) * chunks + index % chunks, index / chunks % blocks};
}

template <class T>
class Item {
 public:
  using A = Accumulator<T>;
  using V = Vector<A>;
  static constexpr int lanes = kLanes<A>;
  // Of a row in the kernel's own memory; no power of two, so that rows spread over the cache.
  static constexpr int64_t stride = kConvChannelBlock + 16;
  static constexpr TileStrides strides{lanes, stride};

  // Room for `tiles` tiles of a segment and the steps around it, for the parameters and their sums.
  static int64_t scratch_size(const CausalConv1dParams& p, int64_t tiles) {
    return stride * (tiles * (kTimeTile + 2 * (p.width - 1)) + 2 * (p.width + 1) + 4);
  }

  Item(const CausalConv1dParams& p, int64_t index, Scratch<A>& scratch)
      : p(p),
        chunk(place_of(p, index).chunk),
        batch(chunk / causal_conv1d_chunks(p)),
        channel(place_of(p, index).block * kConvChannelBlock),
        channels(p.channels - channel < kConvChannelBlock ? p.channels - channel
                                                          : kConvChannelBlock) {
    weight = scratch.take(p.width * stride);
    bias = scratch.take(stride);
    for (int64_t tap = 0; tap < p.width; ++tap) {
      load_row(static_cast<const A*>(p.weight) + tap * p.channels + channel, 1, channels,
               weight + tap * stride, lanes);
    }
    load_state(p.bias, channel, bias);
  }

  // Goes to the chunk's segment `index`; false where there is none.
  bool next_segment(int64_t index) {
    const int64_t i = chunk % causal_conv1d_chunks(p) * kConvSegmentChunk + index;
    if (index == kConvSegmentChunk || i == p.segment_count) return false;
    segment = p.segments[i];
    steps = segment.end - segment.begin;
    return true;
  }

  // Asks for a part of the next segment, where each channel's steps lie side by side.
  [[gnu::always_inline]] void prefetch_by_time(int64_t part) const {
    const int64_t rest = segment.sequence_end - segment.end;
    for (const Strided3* input : {&p.x, &p.dy}) {
      if (input->data == nullptr || input->time != 1) continue;
      const T* first = static_cast<const T*>(input->data) + batch * input->batch + segment.end +
                       channel * input->channel;
      prefetch_part(first, input->channel, channels, rest < kTimeTile ? rest : kTimeTile, part,
                    kTimeTile);
    }
  }

  // Asks for row `step` of the segment that the next item has in this one's place.
  [[gnu::always_inline]] void prefetch(int64_t step) const {
    if (p.x.channel != 1) return prefetch_by_time(step);
    const bool last = channel + kConvChannelBlock >= p.channels;
    const int64_t to = last ? 0 : channel + kConvChannelBlock;
    const int64_t count = p.channels - to < kConvChannelBlock ? p.channels - to : kConvChannelBlock;
    const int64_t t = segment.begin + step + (last ? kConvSegmentChunk * kTimeTile : 0);
    if (t >= p.length) return;
    for (const Strided3* input : {&p.x, &p.dy}) {
      if (input->data != nullptr && input->channel == 1) {
        prefetch_row<T, Access::kRead>(input->data, batch * input->batch + t * input->time + to, count);
      }
    }
    for (const Strided3Out* output : {&p.y, &p.dx}) {
      if (output->data != nullptr) {
        prefetch_row<T, Access::kWrite>(output->data, batch * output->batch + t * output->time + to, count);
      }
    }
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
  int64_t state_offset(int64_t row) const {
    const int64_t state = batch * p.sequences + segment.sequence;
    return (state * (p.width - 1) + row) * p.channels + channel;
  }

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

  // Adds sum_w weight_w x_{t+w} of the vectors at `c` to the sums of `Rows` steps t, of the first
  // of which the row at x is the first input; with Sign -1, x_{t-w}. Rows at once share their
  // loads.
  template <int Width, int Sign, int Rows>
  [[gnu::always_inline]] void convolve(const A* x, int64_t c, V (&sums)[Rows]) const {
    const int64_t width = Width > 0 ? Width : p.width;
    for (int64_t tap = 0; tap < width; ++tap) {
      const V w = load_vector<V>(weight + tap * stride + c);
      for (int row = 0; row < Rows; ++row) {
        sums[row] += w * load_vector<V>(x + (row + Sign * tap) * stride + c);
      }
    }
  }

  const CausalConv1dParams& p;
  int64_t chunk;  // counted through the whole batch
  int64_t batch, channel, channels;
  Segment segment{};
  int64_t steps = 0;
  A *weight, *bias;
};

// Steps done at once where d_conv is known.
template <int Width>
constexpr int kRowsAtOnce = Width > 0 ? 4 : 1;

// The outputs of `Rows` steps, x being the row of the first one's first input.
template <int Width, int Rows, class T>
void forward_rows(const Item<T>& item, const Accumulator<T>* x, T* target) {
  using V = Vector<Accumulator<T>>;
  for (int64_t c = 0; c < item.channels; c += item.lanes) {
    V sums[Rows];
    for (V& sum : sums) sum = load_vector<V>(item.bias + c);
    item.template convolve<Width, 1>(x, c, sums);
    const int64_t rest = item.channels - c < item.lanes ? item.channels - c : item.lanes;
    for (int row = 0; row < Rows; ++row) {
      store_converted(target + row * item.p.y.time + c, 1,
                      item.p.silu ? silu(sums[row]) : sums[row], rest);
    }
  }
}

template <int Width, class T>
void forward_segment(const Item<T>& item, Accumulator<T>* x) {
  constexpr int64_t stride = Item<T>::stride;
  constexpr int rows = kRowsAtOnce<Width>;
  const CausalConv1dParams& p = item.p;
  const Segment& segment = item.segment;
  const int64_t before = p.width - 1;
  item.load_inputs(segment.begin - before, segment.end, x);
  T* target =
      static_cast<T*>(p.y.data) + item.batch * p.y.batch + segment.begin * p.y.time + item.channel;
  int64_t step = 0;
  for (; step + rows <= item.steps; step += rows) {
    for (int row = 0; row < rows; ++row) item.prefetch(step + row);
    forward_rows<Width, rows>(item, x + step * stride, target + step * p.y.time);
  }
  for (; step < item.steps; ++step) {
    forward_rows<Width, 1>(item, x + step * stride, target + step * p.y.time);
  }
  if (!segment.ends()) return;
  for (int64_t row = 0; row < before; ++row) {
    item.store_state(p.final_state, row, x + (item.steps + row) * stride);
  }
}

template <int Width, class T>
void forward_item(Item<T> item, Scratch<Accumulator<T>>& scratch) {
  auto* x = scratch.take((kTimeTile + item.p.width - 1) * item.stride);
  for (int64_t i = 0; item.next_segment(i); ++i) forward_segment<Width>(item, x);
}

// Turns rows of dy into rows of dpre, the gradient before the SiLU.
template <int Width, int Rows, class T>
void through_silu_rows(const Item<T>& item, const Accumulator<T>* x, Accumulator<T>* dpre) {
  using V = Vector<Accumulator<T>>;
  for (int64_t c = 0; c < item.channels; c += item.lanes) {
    V pre[Rows];
    for (V& sum : pre) sum = load_vector<V>(item.bias + c);
    item.template convolve<Width, 1>(x, c, pre);
    for (int row = 0; row < Rows; ++row) {
      auto* at = dpre + row * item.stride + c;
      const V derivative = silu_derivative(pre[row], sigmoid(pre[row]));
      store_vector(at, V(load_vector<V>(at) * derivative));
    }
  }
}

template <int Width, class T>
void through_silu(const Item<T>& item, const Accumulator<T>* x, int64_t count,
                  Accumulator<T>* dpre) {
  constexpr int rows = kRowsAtOnce<Width>;
  int64_t row = 0;
  for (; row + rows <= count; row += rows) {
    through_silu_rows<Width, rows>(item, x + row * item.stride, dpre + row * item.stride);
  }
  for (; row < count; ++row) {
    through_silu_rows<Width, 1>(item, x + row * item.stride, dpre + row * item.stride);
  }
}

// Adds dweight_w = sum_t dpre_t x_{t-W+1+w} of the segment, and in row W dbias = sum_t dpre_t.
template <int Width, class T>
void add_parameter_sums(const Item<T>& item, const Accumulator<T>* x, const Accumulator<T>* dpre,
                        Accumulator<T>* sums) {
  using V = typename Item<T>::V;
  constexpr int64_t stride = Item<T>::stride;
  // As many taps at a time as Width, so that their sums stay in registers.
  constexpr int taps = Width > 0 ? Width : 1;
  for (int64_t c = 0; c < item.channels; c += item.lanes) {
    for (int64_t tap = 0; tap < item.p.width; tap += taps) {
      V dweight[taps];
      for (int i = 0; i < taps; ++i) dweight[i] = load_vector<V>(sums + (tap + i) * stride + c);
      for (int64_t step = 0; step < item.steps; ++step) {
        const V gradient = load_vector<V>(dpre + step * stride + c);
        for (int i = 0; i < taps; ++i) {
          dweight[i] += gradient * load_vector<V>(x + (step + tap + i) * stride + c);
        }
      }
      for (int i = 0; i < taps; ++i) store_vector(sums + (tap + i) * stride + c, dweight[i]);
    }
    V dbias = load_vector<V>(sums + item.p.width * stride + c);
    for (int64_t step = 0; step < item.steps; ++step) {
      dbias += load_vector<V>(dpre + step * stride + c);
    }
    store_vector(sums + item.p.width * stride + c, dbias);
  }
}

// dx of `Rows` steps from `step`: dx_t = sum_w weight_w dpre_{t+W-1-w}. A negative step is an input
// before the sequence, from the initial state.
template <int Width, int Rows, class T>
void input_gradient(const Item<T>& item, const Accumulator<T>* dpre, Accumulator<T>* dx,
                    int64_t step) {
  using V = Vector<Accumulator<T>>;
  const CausalConv1dParams& p = item.p;
  const int64_t around = p.width - 1, t = item.segment.begin + step;
  for (int row = 0; row < Rows; ++row) {
    // Inputs among the sequence's last W-1, the initial state's included, are in the final state.
    const int64_t in_state = t + row - (item.segment.sequence_end - around);
    item.load_state(in_state >= 0 ? p.dfinal_state : nullptr, item.state_offset(in_state),
                    dx + row * item.stride);
  }
  for (int64_t c = 0; c < item.channels; c += item.lanes) {
    V sums[Rows];
    for (int row = 0; row < Rows; ++row) sums[row] = load_vector<V>(dx + row * item.stride + c);
    item.template convolve<Width, -1>(dpre + (step + 2 * around) * item.stride, c, sums);
    for (int row = 0; row < Rows; ++row) store_vector(dx + row * item.stride + c, sums[row]);
  }
  if (step < 0) {
    if (p.dinitial_state != nullptr) item.store_state(p.dinitial_state, around + step, dx);
    return;
  }
  T* target = static_cast<T*>(p.dx.data) + item.batch * p.dx.batch + t * p.dx.time + item.channel;
  for (int row = 0; row < Rows; ++row) {
    store_row(target + row * p.dx.time, item.channels, dx + row * item.stride, item.lanes);
  }
}

// Rows of x and dpre reach W-1 steps past the segment's end, for dx.
template <int Width, class T>
void backward_segment(const Item<T>& item, Accumulator<T>* x, Accumulator<T>* dpre,
                      Accumulator<T>* dx, Accumulator<T>* sums) {
  constexpr int64_t stride = Item<T>::stride;
  const CausalConv1dParams& p = item.p;
  const Segment& segment = item.segment;
  const int64_t around = p.width - 1, rest = segment.sequence_end - segment.end;
  const int64_t after = rest < around ? rest : around, rows = item.steps + after;
  item.load_inputs(segment.begin - around, segment.end + after, x);
  load_tile<T>(p.dy, item.batch, segment.begin, rows, item.channel, item.channels,
               dpre + around * stride, item.strides);
  if (p.silu) through_silu<Width>(item, x, rows, dpre + around * stride);
  add_parameter_sums<Width>(item, x, dpre + around * stride, sums);
  // No gradient flows from before the sequence's begin or after its end; other segments give
  // theirs.
  for (int64_t row = 0; row < around; ++row) item.load_state(nullptr, 0, dpre + row * stride);
  for (int64_t row = around + rows; row < item.steps + 2 * around; ++row) {
    item.load_state(nullptr, 0, dpre + row * stride);
  }
  // A segment that begins its sequence also gives the gradient of the W-1 inputs before it.
  constexpr int rows_at_once = kRowsAtOnce<Width>;
  int64_t step = segment.starts() ? -around : 0;
  for (; step < 0; ++step) input_gradient<Width, 1>(item, dpre, dx, step);
  for (; step + rows_at_once <= item.steps; step += rows_at_once) {
    for (int row = 0; row < rows_at_once; ++row) item.prefetch(step + row);
    input_gradient<Width, rows_at_once>(item, dpre, dx, step);
  }
  for (; step < item.steps; ++step) input_gradient<Width, 1>(item, dpre, dx, step);
}

template <int Width, class T>
void backward_item(Item<T> item, Scratch<Accumulator<T>>& scratch) {
  using A = Accumulator<T>;
  const CausalConv1dParams& p = item.p;
  const int64_t tile = (kTimeTile + 2 * (p.width - 1)) * item.stride;
  A *x = scratch.take(tile), *dpre = scratch.take(tile);
  A* dx = scratch.take(kRowsAtOnce<Width> * item.stride);
  A* sums = scratch.take((p.width + 1) * item.stride);
  for (int64_t i = 0; i < (p.width + 1) * item.stride; ++i) sums[i] = 0;
  for (int64_t i = 0; item.next_segment(i); ++i) backward_segment<Width>(item, x, dpre, dx, sums);
  for (int64_t tap = 0; tap < p.width; ++tap) {
    store_row(static_cast<A*>(p.dweight_partial) + (item.chunk * p.width + tap) * p.channels +
                  item.channel,
              item.channels, sums + tap * item.stride, item.lanes);
  }
  store_row(static_cast<A*>(p.dbias_partial) + item.chunk * p.channels + item.channel,
            item.channels, sums + p.width * item.stride, item.lanes);
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
    Scratch<Accumulator<T>> scratch(Item<T>::scratch_size(p, 2));
    for (int64_t index = begin; index < end; ++index) {
      const Item<T> item(p, index, scratch);
      p.width == 4 ? backward_item<4>(item, scratch) : backward_item<0>(item, scratch);
      scratch.take_all_back();
    }
  });
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
