// SPDX-License-Identifier: Apache-2.0
//
// A work item is a chunk of segments of time of a block of channels of one row of the batch. The
// inputs of each segment and the W-1 steps around them are read in place, or where they need
// converting first brought into rows of the accumulator's type; lanes are channels.
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

template <class A>
struct Rows {
  const A* first;
  int64_t stride;
  const A* row(int64_t index) const { return first + index * stride; }
};

// A vector for each tap: kept in registers where their number is known, else in rows of memory.
template <int Width, class V>
class ColumnParameters {
 public:
  using A = ScalarOf<V>;

  ColumnParameters(A* rows, int64_t stride) : rows_(rows), stride_(stride) {
    for (int tap = 0; tap < Width; ++tap) kept_[tap] = load_vector<V>(rows + tap * stride);
  }
  V operator[](int64_t tap) const {
    return Width > 0 ? kept_[tap] : load_vector<V>(rows_ + tap * stride_);
  }
  void add(int64_t tap, V v) {
    if constexpr (Width > 0) {
      kept_[tap] += v;
    } else {
      store_vector(rows_ + tap * stride_, V((*this)[tap] + v));
    }
  }
  void store() const {
    for (int tap = 0; tap < Width; ++tap) store_vector(rows_ + tap * stride_, kept_[tap]);
  }

 private:
  A* rows_;
  int64_t stride_;
  V kept_[Width > 0 ? Width : 1];
};

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
        prefetch_row<T, Access::kRead>(input->data, batch * input->batch + t * input->time + to,
                                       count);
      }
    }
    for (const Strided3Out* output : {&p.y, &p.dx}) {
      if (output->data != nullptr && !streamed) {
        prefetch_row<T, Access::kWrite>(output->data, batch * output->batch + t * output->time + to,
                                        count);
      }
    }
  }

  // Rows [begin, end) of the whole row: in the tensor itself where nothing is to be converted, else
  // brought into the tile.
  Rows<A> rows_of(const Strided3& input, int64_t begin, int64_t end, A* tile) const {
    if constexpr (std::is_same_v<T, A>) {
      if (input.channel == 1 && channels % lanes == 0) {
        const A* row = static_cast<const A*>(input.data) + batch * input.batch;
        return {row + begin * input.time + channel, input.time};
      }
    }
    load_tile<T>(input, batch, begin, end - begin, channel, channels, tile, strides);
    return {tile, stride};
  }

  // The same of x, or of the initial state before the sequence.
  Rows<A> inputs(int64_t begin, int64_t end, A* tile) const {
    if (begin >= segment.sequence_begin) return rows_of(p.x, begin, end, tile);
    A* row = tile;
    for (; begin < segment.sequence_begin && begin < end; ++begin, row += stride) {
      load_state(p.initial_state, state_offset(begin - segment.sequence_begin + p.width - 1), row);
    }
    load_tile<T>(p.x, batch, begin, end - begin, channel, channels, row, strides);
    return {tile, stride};
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

  // `count` elements of an output.
  [[gnu::always_inline]] void store_output(T* target, V v, int64_t count) const {
    if (streamed && count == lanes) {
      stream_whole(target, v);
    } else {
      store_converted(target, 1, v, count);
    }
  }

  const CausalConv1dParams& p;
  const bool streamed = kCanStream<T> &&
                        p.batch * p.length * p.channels > kCacheBytes / int64_t(sizeof(T));
  int64_t chunk;  // counted through the whole batch
  int64_t batch, channel, channels;
  Segment segment{};
  int64_t steps = 0;
  A *weight, *bias;
};

// Steps done at once where d_conv is known, which share their loads.
template <int Width>
constexpr int kStepsAtOnce = Width > 0 ? 4 : 1;

// The outputs of `Steps` steps from `step` on.
template <int Width, int Steps, class T>
void forward_steps(const Item<T>& item, Rows<Accumulator<T>> x, int64_t step, T* target) {
  using V = typename Item<T>::V;
  const int64_t width = Width > 0 ? Width : item.p.width;
  for (int64_t c = 0; c < item.channels; c += item.lanes) {
    V sums[Steps];
    for (V& sum : sums) sum = load_vector<V>(item.bias + c);
    for (int64_t tap = 0; tap < width; ++tap) {
      const V weight = load_vector<V>(item.weight + tap * item.stride + c);
      for (int i = 0; i < Steps; ++i) {
        sums[i] += weight * load_vector<V>(x.row(step + i + tap) + c);
      }
    }
    const int64_t rest = item.channels - c < item.lanes ? item.channels - c : item.lanes;
    for (int i = 0; i < Steps; ++i) {
      item.store_output(target + (step + i) * item.p.y.time + c,
                        item.p.silu ? silu(sums[i]) : sums[i], rest);
    }
  }
}

template <int Width, class T>
void forward_segment(const Item<T>& item, Accumulator<T>* tile) {
  constexpr int at_once = kStepsAtOnce<Width>;
  const CausalConv1dParams& p = item.p;
  const Segment& segment = item.segment;
  const int64_t before = p.width - 1;
  const auto x = item.inputs(segment.begin - before, segment.end, tile);
  T* target =
      static_cast<T*>(p.y.data) + item.batch * p.y.batch + segment.begin * p.y.time + item.channel;
  int64_t step = 0;
  for (; step + at_once <= item.steps; step += at_once) {
    for (int i = 0; i < at_once; ++i) item.prefetch(step + i);
    forward_steps<Width, at_once>(item, x, step, target);
  }
  for (; step < item.steps; ++step) forward_steps<Width, 1>(item, x, step, target);
  if (!segment.ends()) return;
  for (int64_t row = 0; row < before; ++row) {
    item.store_state(p.final_state, row, x.row(item.steps + row));
  }
}

template <int Width, class T>
void forward_item(Item<T> item, Scratch<Accumulator<T>>& scratch) {
  auto* x = scratch.take((kTimeTile + item.p.width - 1) * item.stride);
  for (int64_t i = 0; item.next_segment(i); ++i) forward_segment<Width>(item, x);
}

// dpre, the gradient before the SiLU, of `rows` steps of the column of vectors at `c`, and what the
// segment's own add to dweight_w = sum_t dpre_t x_{t-W+1+w} and, in row W of sums, to
// dbias = sum_t dpre_t.
template <int Width, class T>
void output_gradient(const Item<T>& item, Rows<Accumulator<T>> x, Rows<Accumulator<T>> dy,
                     int64_t c, int64_t rows, Accumulator<T>* dpre, Accumulator<T>* sums) {
  using V = typename Item<T>::V;
  const int64_t width = Width > 0 ? Width : item.p.width;
  const ColumnParameters<Width, V> weight(item.weight + c, item.stride);
  ColumnParameters<Width, V> dweight(sums + c, item.stride);
  const V bias = load_vector<V>(item.bias + c);
  V dbias = load_vector<V>(sums + width * item.stride + c);
  const auto through_silu = [&]<int Steps>(int64_t step) __attribute__((always_inline)) {
    V gradients[Steps], pre[Steps];
    for (int i = 0; i < Steps; ++i) {
      gradients[i] = load_vector<V>(dy.row(step + i) + c);
      pre[i] = bias;
    }
    if (item.p.silu) {
      for (int64_t tap = 0; tap < width; ++tap) {
        for (int i = 0; i < Steps; ++i) {
          pre[i] += weight[tap] * load_vector<V>(x.row(step + i + tap) + c);
        }
      }
      V gate[Steps];
      for (int i = 0; i < Steps; ++i) gate[i] = sigmoid(pre[i]);
      for (int i = 0; i < Steps; ++i) gradients[i] *= silu_derivative(pre[i], gate[i]);
    }
    for (int i = 0; i < Steps; ++i) store_vector(dpre + (step + i) * item.lanes, gradients[i]);
  };
  int64_t next = 0;
  for (; next + kStepsAtOnce<Width> <= rows; next += kStepsAtOnce<Width>)
    through_silu.template operator()<kStepsAtOnce<Width>>(next);
  for (; next < rows; ++next) through_silu.template operator()<1>(next);
  for (int64_t step = 0; step < item.steps; ++step) {
    const V gradient = load_vector<V>(dpre + step * item.lanes);
    dbias += gradient;
    for (int64_t tap = 0; tap < width; ++tap) {
      dweight.add(tap, gradient * load_vector<V>(x.row(step + tap) + c));
    }
  }
  dweight.store();
  store_vector(sums + width * item.stride + c, dbias);
}

// dx_t = sum_w weight_w dpre_{t+W-1-w} from step `first` on, dpre being of step 0. A negative step
// is an input before the sequence, from the initial state.
template <int Width, class T>
void input_gradient(const Item<T>& item, const Accumulator<T>* dpre, int64_t c, int64_t first) {
  using V = typename Item<T>::V;
  using A = Accumulator<T>;
  const CausalConv1dParams& p = item.p;
  const int64_t width = Width > 0 ? Width : p.width, around = width - 1;
  const int64_t rest = item.channels - c < item.lanes ? item.channels - c : item.lanes;
  const ColumnParameters<Width, V> weight(item.weight + c, item.stride);
  T* target = static_cast<T*>(p.dx.data) + item.batch * p.dx.batch +
              item.segment.begin * p.dx.time + item.channel + c;
  const auto gradient = [&](int64_t step, V dx) __attribute__((always_inline)) {
    for (int64_t tap = 0; tap < width; ++tap) {
      dx += weight[tap] * load_vector<V>(dpre + (step + around - tap) * item.lanes);
    }
    return dx;
  };
  // Inputs among the sequence's last W-1, the initial state's included, are in the final state.
  const int64_t end = item.segment.sequence_end - item.segment.begin, kept = end - around;
  const auto from_final_state = [&](int64_t step) {
    if (step < kept || p.dfinal_state == nullptr) return V{};
    const A* state = static_cast<const A*>(p.dfinal_state);
    return load_converted<A>(state + item.state_offset(step - kept) + c, 1, rest);
  };
  int64_t step = first;
  for (; step < 0; ++step) {
    const V dx = gradient(step, from_final_state(step));
    if (p.dinitial_state == nullptr) continue;
    A* state = static_cast<A*>(p.dinitial_state) + item.state_offset(around + step) + c;
    store_converted(state, 1, dx, rest);
  }
  for (; step < item.steps && step < kept; ++step) {
    item.store_output(target + step * p.dx.time, gradient(step, V{}), rest);
  }
  for (; step < item.steps; ++step) {
    item.store_output(target + step * p.dx.time, gradient(step, from_final_state(step)), rest);
  }
}

// Rows of x and dy reach W-1 steps past the segment's end, for dx.
template <int Width, class T>
void backward_segment(const Item<T>& item, Accumulator<T>* x_tile, Accumulator<T>* dy_tile,
                      Accumulator<T>* dpre, Accumulator<T>* sums) {
  const CausalConv1dParams& p = item.p;
  const Segment& segment = item.segment;
  const int64_t around = p.width - 1, rest = segment.sequence_end - segment.end;
  const int64_t after = rest < around ? rest : around, rows = item.steps + after;
  const auto x = item.inputs(segment.begin - around, segment.end + after, x_tile);
  const auto dy = item.rows_of(p.dy, segment.begin, segment.end + after, dy_tile);
  // No gradient flows from before the sequence's begin or after its end; other segments give
  // theirs.
  for (int64_t i = 0; i < around * item.lanes; ++i) dpre[i] = 0;
  auto* own = dpre + around * item.lanes;
  for (int64_t i = rows * item.lanes; i < (item.steps + around) * item.lanes; ++i) own[i] = 0;
  const int64_t columns = (item.channels + item.lanes - 1) / item.lanes;
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t step = kTimeTile * column / columns; step < kTimeTile * (column + 1) / columns;
         ++step) {
      item.prefetch(step);
    }
    output_gradient<Width>(item, x, dy, column * item.lanes, rows, own, sums);
    // A segment that begins its sequence also gives the gradient of the W-1 inputs before it.
    input_gradient<Width>(item, own, column * item.lanes, segment.starts() ? -around : 0);
  }
}

template <int Width, class T>
void backward_item(Item<T> item, Scratch<Accumulator<T>>& scratch) {
  using A = Accumulator<T>;
  const CausalConv1dParams& p = item.p;
  const int64_t tile = (kTimeTile + 2 * (p.width - 1)) * item.stride;
  A *x = scratch.take(tile), *dy = scratch.take(tile), *dpre = scratch.take(tile);
  A* sums = scratch.take((p.width + 1) * item.stride);
  for (int64_t i = 0; i < (p.width + 1) * item.stride; ++i) sums[i] = 0;
  for (int64_t i = 0; item.next_segment(i); ++i) backward_segment<Width>(item, x, dy, dpre, sums);
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
    finish_streaming();
  });
}

void causal_conv1d_backward(const CausalConv1dParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    Scratch<Accumulator<T>> scratch(Item<T>::scratch_size(p, 3));
    for (int64_t index = begin; index < end; ++index) {
      const Item<T> item(p, index, scratch);
      p.width == 4 ? backward_item<4>(item, scratch) : backward_item<0>(item, scratch);
      scratch.take_all_back();
    }
    finish_streaming();
  });
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
