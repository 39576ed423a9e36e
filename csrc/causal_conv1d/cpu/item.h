// SPDX-License-Identifier: Apache-2.0
//
// A work item is a block of channels in a chunk of segments of time of one row of the batch. The
// inputs of each segment and the W-1 steps around them are read in place, or first converted into
// rows of the accumulator's type; lanes are channels.
#pragma once

#include "causal_conv1d/cpu/kernels.h"
#include "common/cpu/tiles.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {

// Rows of channels, one for each step or tap.
template <class A>
struct Rows {
  const A* first;
  int64_t stride;
  const A* row(int64_t index) const { return first + index * stride; }
  Rows at(int64_t index, int64_t c) const { return {row(index) + c, stride}; }
};

// Rows that are needed soon.
template <class T, Access Use>
struct Ahead {
  const T* first = nullptr;
  int64_t stride = 0;

  template <int Steps>
  [[gnu::always_inline]] void prefetch(int64_t step, int64_t c) const {
    if (first == nullptr) return;
    for (int i = 0; i < Steps; ++i) prefetch_row<T, Use>(first, (step + i) * stride + c, 1);
  }
};

// Rows of an output.
template <class T>
struct OutputRows {
  T* first;
  int64_t stride;
  bool non_temporal;
  Ahead<T, Access::kWrite> ahead;

  // `count` lanes, which only a single step may have fewer of than a vector.
  template <int Steps, class V>
  [[gnu::always_inline]] void store(int64_t step, int64_t c, const V (&v)[Steps],
                                    int64_t count) const {
    T* target = first + step * stride + c;
    if constexpr (Steps == 1) {
      if (count < VectorTraits<V>::lanes) return store_converted(target, 1, v[0], count);
    }
    if (non_temporal) {
      for (int i = 0; i < Steps; ++i) store_non_temporal(target + i * stride, v[i]);
    } else {
      for (int i = 0; i < Steps; ++i) store_whole(target + i * stride, v[i]);
      ahead.template prefetch<Steps>(step, c);
    }
  }
};

template <class T, class Params>
class ConvItem {
 public:
  using A = Accumulator<T>;
  using V = Vector<A>;
  static constexpr int lanes = kLanes<A>;
  // Of a row in the kernel's own memory; no power of two, so that rows spread over the cache.
  static constexpr int64_t stride = kConvChannelBlock + 16;
  static constexpr TileStrides strides{lanes, stride};

  // A segment and the W-1 steps before and after it.
  static int64_t tile_size(const Params& p) { return stride * (kConvTimeTile + 2 * (p.width - 1)); }
  // weight and bias, or their sums.
  static int64_t parameters_size(const Params& p) { return stride * (p.width + 1); }
  static int64_t scratch_size(const Params& p, int64_t tiles) {
    return tiles * tile_size(p) + 2 * parameters_size(p);
  }

  ConvItem(const Params& p, RowSegments segments, int64_t index, Scratch<A>& scratch)
      : p(p),
        chunk(index / conv_blocks(p)),
        batch(chunk / conv_chunks(segments)),
        channel(index % conv_blocks(p) * kConvChannelBlock),
        channels(block_channels(channel)),
        first_segment(chunk % conv_chunks(segments) * kConvSegmentChunk),
        segments(segments) {
    A* taps = scratch.take(p.width * stride);
    bias = scratch.take(stride);
    for (int64_t tap = 0; tap < p.width; ++tap) {
      load_row(static_cast<const A*>(p.weight.data) + channel * p.width + tap, p.width, channels,
               taps + tap * stride, lanes);
    }
    weight = {taps, stride};
    load_state(p.bias.data, channel, bias);
  }

  // Goes to the chunk's segment `index`; false where there is none.
  bool next_segment(int64_t index) {
    if (!has_segment(index)) return false;
    const Segment* const chunk_segments = segments.data + first_segment;
    segment = chunk_segments[index];
    steps = segment.end - segment.begin;
    next_begin = chunk_segments[has_segment(index + 1) ? index + 1 : 0].begin;
    return true;
  }

  // Steps [begin, end) of the row: in the tensor itself where nothing is to be converted, else
  // loaded into the tile.
  Rows<A> rows_of(const InputView& input, int64_t begin, int64_t end, A* tile) const {
    if constexpr (std::is_same_v<T, A>) {
      if (input.channel == 1 && channels % lanes == 0) {
        const A* row = static_cast<const A*>(input.data) + batch * input.batch;
        return {row + begin * input.time + channel, input.time};
      }
    }
    load_steps(input, begin, end, tile);
    return {tile, stride};
  }

  // The same of x, or of the initial state before the sequence.
  Rows<A> inputs(int64_t begin, int64_t end, A* tile) const {
    if (begin >= segment.sequence_begin) return rows_of(p.x, begin, end, tile);
    A* row = tile;
    for (; begin < segment.sequence_begin && begin < end; ++begin, row += stride) {
      load_state(p.initial_state, state_offset(begin - segment.sequence_begin + p.width - 1), row);
    }
    load_steps(p.x, begin, end, row);
    return {tile, stride};
  }

  // Where this block's channels of a row of this sequence's state begin.
  int64_t state_offset(int64_t row) const {
    const int64_t state = batch * p.sequences + segment.sequence;
    return (state * (p.width - 1) + row) * p.channels + channel;
  }

  // Its rows; absent ones have none.
  Rows<A> state(const void* state) const {
    if (state == nullptr) return {nullptr, 0};
    return {static_cast<const A*>(state) + state_offset(0), p.channels};
  }

  // Absent is 0.
  void load_state(const void* state, int64_t offset, A* row) const {
    if (state == nullptr) {
      for (int64_t c = 0; c < channels; c += lanes) store_vector(row + c, V{});
    } else {
      load_row(static_cast<const A*>(state) + offset, 1, channels, row, lanes);
    }
  }

  // The segment's rows of an output.
  OutputRows<T> output(const OutputView& output) const {
    T* first = static_cast<T*>(output.data) + batch * output.batch + segment.begin * output.time;
    return {first + channel, output.time, non_temporal,
            rows_ahead<Access::kWrite>(first, output.time)};
  }

  // The rows of an input that follow this segment's; where a channel's steps are contiguous, the
  // loads of its tile prefetch them.
  Ahead<T, Access::kRead> ahead(const InputView& input) const {
    if (input.channel != 1) return {};
    return rows_ahead<Access::kRead>(
        static_cast<const T*>(input.data) + batch * input.batch + segment.begin * input.time,
        input.time);
  }

  const Params& p;
  const bool non_temporal = kHasNonTemporal<T> &&
                            p.batch * p.length * p.channels > kCacheBytes / int64_t(sizeof(T));
  int64_t chunk;  // counted through the whole batch
  int64_t batch, channel, channels;
  int64_t first_segment;  // of the chunk
  RowSegments segments;
  Segment segment{};
  int64_t steps = 0;
  Rows<A> weight;
  A* bias;

 private:
  // Those before the segment apart, so that the segment's first step begins a square.
  void load_steps(const InputView& input, int64_t begin, int64_t end, A* tile) const {
    // The chunk's next segment, and after the last the next block's first.
    int64_t ahead = (next_begin - segment.begin) * input.time;
    if (next_begin <= segment.begin) {
      ahead = in_last_block() ? 0 : ahead + kConvChannelBlock * input.channel;
    }
    for (const int64_t stop : {segment.begin, end}) {
      if (begin >= stop) continue;
      load_tile<T>(input, batch, begin, stop - begin, channel, channels, tile, strides, ahead);
      tile += (stop - begin) * stride;
      begin = stop;
    }
  }

  bool has_segment(int64_t index) const {
    return index < kConvSegmentChunk && first_segment + index < segments.count;
  }

  bool in_last_block() const { return channel + kConvChannelBlock >= p.channels; }

  int64_t block_channels(int64_t first) const {
    const int64_t rest = p.channels - first;
    return rest < kConvChannelBlock ? rest : kConvChannelBlock;
  }

  // The rows processed after this segment's, given its first one; none at the row's end.
  template <Access Use>
  Ahead<T, Use> rows_ahead(const T* row, int64_t time) const {
    if (!in_last_block()) return {row + channel + kConvChannelBlock, time};
    const int64_t later = kConvSegmentChunk * kConvTimeTile;
    if (segment.end + later > p.length) return {};
    return {row + later * time, time};
  }

  int64_t next_begin = 0;  // of the segment that comes after this one, in this block or the next
};

// Calls work(item, scratch) for the work items [begin, end), whose scratch has room for `tiles`
// tiles.
template <class Params, class Work>
void for_each_conv_item(const Params& p, RowSegments segments, int64_t begin, int64_t end,
                        int64_t tiles, Work work) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using Item = ConvItem<decltype(type), Params>;
    Scratch<typename Item::A> scratch(Item::scratch_size(p, tiles));
    for (int64_t index = begin; index < end; ++index) {
      work(Item(p, segments, index, scratch), scratch);
      scratch.reset();
    }
    fence_non_temporal();
  });
}

// Sums i += sum_w weight_w row_{i+w}, of one vector of channels.
template <int Steps, class V, class Width>
[[gnu::always_inline]] inline void add_window(V (&sums)[Steps], Rows<ScalarOf<V>> rows,
                                              Rows<ScalarOf<V>> weight, Width width) {
  for (int64_t tap = 0; tap < width; ++tap) {
    const V factor = load_vector<V>(weight.row(tap));
    for (int i = 0; i < Steps; ++i) sums[i] += factor * load_vector<V>(rows.row(tap + i));
  }
}

// Goes through steps [begin, end) of columns of vectors, with work.operator()<Steps>(step, c,
// count) for `Steps` steps that share their loads. Only in a single step does a vector have fewer
// channels than lanes.
template <class A, class Work>
[[gnu::always_inline]] inline void for_each_vector_of_steps(int64_t begin, int64_t end,
                                                            int64_t channels, Work work) {
  constexpr int at_once = 4, lanes = kLanes<A>;
  const int64_t whole = channels / lanes * lanes;
  int64_t step = begin;
  for (; step + at_once <= end; step += at_once) {
    for (int64_t c = 0; c < whole; c += lanes) work.template operator()<at_once>(step, c, lanes);
  }
  for (; step < end; ++step) {
    for (int64_t c = 0; c < whole; c += lanes) work.template operator()<1>(step, c, lanes);
  }
  if (whole == channels) return;
  for (step = begin; step < end; ++step) work.template operator()<1>(step, whole, channels - whole);
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
