// SPDX-License-Identifier: Apache-2.0
//
// A thread takes a range of channels of one row of the batch through the row's segments of time.
// In each segment it goes through the range in strips, whose inputs it first loads into tiles of
// the accumulator's type; lanes are channels.
#pragma once

#include "common/cpu/tiles.h"
#include "selective_scan/cpu/kernels.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {

// Consecutive blocks of one group: long stretches of memory are prefetched better.
struct ChannelRange {
  int64_t batch, group, block, blocks, channel, channels, columns;
};

// Fewer where each channel's steps are contiguous, since each channel is then on its own page.
inline int64_t blocks_in_range(const SelectiveScanInputs& p) { return p.u.channel == 1 ? 12 : 2; }

// The range that begins with work item `begin`; its last is before `end`.
template <class A>
[[gnu::always_inline]] inline ChannelRange channel_range(const SelectiveScanInputs& p,
                                                         int64_t begin, int64_t end) {
  const int64_t in_group = scan_blocks_in_group(p), per_group = p.group_channels;
  ChannelRange range;
  range.block = begin % in_group;
  range.group = begin / in_group % p.groups;
  range.batch = begin / in_group / p.groups;
  range.blocks = end - begin < blocks_in_range(p) ? end - begin : blocks_in_range(p);
  if (range.blocks > in_group - range.block) range.blocks = in_group - range.block;
  const int64_t first = range.block * kScanChannelBlock, rest = per_group - first;
  range.channel = range.group * per_group + first;
  range.channels =
      rest < range.blocks * kScanChannelBlock ? rest : range.blocks * kScanChannelBlock;
  range.columns = (range.channels + kLanes<A> - 1) / kLanes<A>;
  return range;
}

// The tiles of a strip, and the inputs and outputs that are prefetched for the next one. The
// forward stores dt and dt * u in place of delta and u.
struct ForwardTiles {
  using Params = SelectiveScanForward;
  static constexpr int64_t kStripChannels = 256;
  enum { kU, kDelta, kY, kZ, kCount, kDt = kDelta, kDtU = kU };

  template <class Input, class Output>
  [[gnu::always_inline]] static void each(const Params& p, Input input, Output output) {
    for (const InputView* view : {&p.u, &p.delta, &p.z}) input(*view);
    output(p.y);
  }
};
struct BackwardTiles {
  using Params = SelectiveScanBackward;
  static constexpr int64_t kStripChannels = kScanChannelBlock;
  // kDelta: once loaded, dt's derivative by delta; kDy: the gradient of y before the gate; kGB:
  // sum_n g B; kGA: sum_n A a g h_{t-1}.
  enum { kU, kDelta, kY, kZ, kDt, kDtU, kDy, kGB, kGA, kCount };

  template <class Input, class Output>
  [[gnu::always_inline]] static void each(const Params& p, Input input, Output output) {
    for (const InputView* view : {&p.u, &p.delta, &p.z, &p.dy}) input(*view);
    for (const OutputView* view : {&p.du, &p.ddelta, &p.dz}) output(*view);
  }
};

// Per channel: [column][lane]. Per state and channel: [state][column][lane]. B and C:
// [step][state]. Per step: [column][tile][step][lane].
template <class T, class Layout>
struct Tiles {
  using A = Accumulator<T>;
  using V = Vector<A>;
  using Params = typename Layout::Params;
  using IntScalar = typename VectorTraits<V>::IntScalar;
  static constexpr int lanes = kLanes<A>;
  // One row more than there are steps: with a multiple of 4096 bytes between the rows of two tiles,
  // loads of one would wait for stores to the other (4K aliasing).
  static constexpr int64_t rows = kScanTimeTile + 1;
  static constexpr int64_t strip_columns = Layout::kStripChannels / lanes;
  static constexpr TileStrides strides{Layout::kCount * rows * lanes, lanes};

  // The most channels that a range has, in whole columns.
  static int64_t max_channels(const Params& p) {
    const int64_t per_group = (p.group_channels + lanes - 1) / lanes * lanes;
    const int64_t most = blocks_in_range(p) * kScanChannelBlock;
    return per_group < most ? per_group : most;
  }

  static int64_t scratch_size(const Params& p) {
    return strip_columns * strides.column + max_channels(p) * (4 + 2 * p.d_state) +
           2 * p.d_state * kScanTimeTile;
  }

  Tiles(const Params& p, const ChannelRange& range, Scratch<A>& scratch)
      : p(p), range(range), channels(range.columns * lanes) {
    tiles = scratch.take(strip_columns * strides.column);
    D = scratch.take(channels);
    delta_bias = scratch.take(channels);
    A_log2e = scratch.take(p.d_state * channels);
    h = scratch.take(p.d_state * channels);
    steepest = scratch.take(channels);
    largest_exponent = scratch.take(channels);
    B = scratch.take(p.d_state * kScanTimeTile);
    C = scratch.take(p.d_state * kScanTimeTile);
    load_channel_parameter(p.D.data, D);
    load_channel_parameter(p.delta_bias.data, delta_bias);
    // A carries log2(e), so that the decay is one exp2.
    load_by_state(p.A.data, range.channel, A_log2e);
    for (int64_t c = 0; c < channels; ++c) steepest[c] = 0;
    for (int64_t n = 0; n < p.d_state; ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        A& value = A_log2e[n * channels + c];
        value *= A(1.4426950408889634);
        const A steepness = value < 0 ? -value : value;
        if (steepness > steepest[c] || steepness != steepness) steepest[c] = steepness;
      }
    }
  }

  // A column's rows of one tile, while its strip is processed.
  A* column(int64_t column, int which) const {
    return tiles + column % strip_columns * strides.column + which * rows * lanes;
  }

  // The strip that begins with column `first`: the column after its last, and its channels.
  int64_t strip_end(int64_t first) const {
    return first + strip_columns < range.columns ? first + strip_columns : range.columns;
  }
  int64_t channels_in_strip(int64_t first) const {
    const int64_t rest = range.channels - first * lanes;
    return rest < Layout::kStripChannels ? rest : Layout::kStripChannels;
  }

  void load_channel_parameter(const void* source, A* target) const {
    for (int64_t c = 0; c < channels; ++c) {
      const bool present = source != nullptr && c < range.channels;
      target[c] = present ? static_cast<const A*>(source)[range.channel + c] : A(0);
    }
  }

  // From the layout (row, N), `row` being the range's first; absent is 0.
  void load_by_state(const void* source, int64_t row, A* target) const {
    for (int64_t n = 0; n < p.d_state; ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        const bool present = source != nullptr && c < range.channels;
        target[n * channels + c] =
            present ? static_cast<const A*>(source)[(row + c) * p.d_state + n] : A(0);
      }
    }
  }

  void store_by_state(const A* source, int64_t row, void* target) const {
    for (int64_t c = 0; c < range.channels; ++c) {
      for (int64_t n = 0; n < p.d_state; ++n) {
        static_cast<A*>(target)[(row + c) * p.d_state + n] = source[n * channels + c];
      }
    }
  }

  // The row of a state that belongs to the segment's sequence.
  int64_t state_row(const Segment& segment) const {
    return (range.batch * p.sequences + segment.sequence) * p.channels + range.channel;
  }

  // From the first saved state to that on entering the segment's tile, which the segment begins.
  int64_t saved_offset(const Segment& segment) const {
    const int64_t row = range.batch * scan_tiles(p) + segment.begin / kScanTimeTile;
    return row * p.d_state * p.channels + range.channel;
  }

  void load_input(const InputView& input, const Segment& segment, int64_t first, int which) const {
    load_tile<T>(input, range.batch, segment.begin, steps, range.channel + first * lanes,
                 channels_in_strip(first), column(first, which), strides);
  }

  void load_input(const GroupedView& input, const Segment& segment, A* target) const {
    const T* source =
        static_cast<const T*>(input.data) + range.batch * input.batch + range.group * input.group;
    for (int64_t t = segment.begin; t < segment.end; ++t, target += p.d_state) {
      const T* row = source + t * input.time;
      if (input.state == 1) {
        for (int64_t n = 0; n < p.d_state; ++n) target[n] = to_accumulator(row[n]);
      } else {
        for (int64_t n = 0; n < p.d_state; ++n) target[n] = to_accumulator(row[n * input.state]);
      }
    }
  }

  void store_output(int which, const Segment& segment, int64_t first,
                    const OutputView& output) const {
    store_tile<T>(output, range.batch, segment.begin, steps, range.channel + first * lanes,
                  channels_in_strip(first), column(first, which), strides);
  }

  // The segment's inputs that all strips share.
  void load(const Segment& segment) {
    steps = segment.end - segment.begin;
    load_input(p.B, segment, B);
    load_input(p.C, segment, C);
  }

  void load_strip(const Segment& segment, int64_t first) const {
    load_input(p.u, segment, first, Layout::kU);
    load_input(p.delta, segment, first, Layout::kDelta);
    if (gated()) load_input(p.z, segment, first, Layout::kZ);
    for (int64_t column = first; column < strip_end(first); ++column) prepare_column(column);
  }

  // Of a loaded column, what is the same for all states; y begins as D u.
  void prepare_column(int64_t c) const {
    using Int = typename VectorTraits<V>::Int;
    const V bias = load_vector<V>(delta_bias + c * lanes), skip = load_vector<V>(D + c * lanes);
    A *u = column(c, Layout::kU), *delta = column(c, Layout::kDelta), *y = column(c, Layout::kY);
    A *dt = column(c, Layout::kDt), *dt_u = column(c, Layout::kDtU);
    Int largest_dt{};  // as bits without the sign, of which a NaN's are the largest
    for (int64_t at = 0; at < steps * lanes; at += lanes) {
      const V biased = load_vector<V>(delta + at) + bias, u_step = load_vector<V>(u + at);
      V dt_step = biased, derivative = V{} + A(1);
      if (p.delta_softplus) {
        const Softplus<V> softplus = softplus_with_derivative(biased);
        dt_step = softplus.value;
        derivative = softplus.derivative;
      }
      if constexpr (Layout::kDelta != Layout::kDt) store_vector(delta + at, derivative);
      store_vector(dt + at, dt_step);
      store_vector(dt_u + at, V(dt_step * u_step));
      store_vector(y + at, V(skip * u_step));
      const Int bits = __builtin_bit_cast(Int, dt_step) & std::numeric_limits<IntScalar>::max();
      largest_dt = bits > largest_dt ? bits : largest_dt;
    }
    const V steepness = load_vector<V>(steepest + c * lanes);
    store_vector(largest_exponent + c * lanes, V(steepness * __builtin_bit_cast(V, largest_dt)));
  }

  // Whether all decays of a prepared column can be had by exp2_in_range.
  bool exponents_in_range(int64_t c) const {
    return all_at_most(load_vector<V>(largest_exponent + c * lanes), A(126));
  }

  // Prefetches a part of the rows of the strip after the one that begins with column `first`,
  // perhaps in the next segment, so that memory is read while this one is computed.
  [[gnu::always_inline]] void prefetch_next(const Segment& segment, const Segment* next,
                                            int64_t first, int64_t part, int64_t parts) const {
    const bool last = strip_end(first) == range.columns;
    if (last && next == nullptr) return;
    const Segment& ahead = last ? *next : segment;
    const int64_t column = last ? 0 : strip_end(first);
    const int64_t channel = range.channel + column * lanes, count = channels_in_strip(column);
    const int64_t length = ahead.end - ahead.begin;
    const auto prefetch = [&]<Access Use>(const void* data, int64_t batch,
                                          int64_t time) __attribute__((always_inline)) {
      if (data == nullptr) return;
      for (int64_t row = length * part / parts; row < length * (part + 1) / parts; ++row) {
        prefetch_row<T, Use>(data, range.batch * batch + (ahead.begin + row) * time + channel,
                             count);
      }
    };
    const auto input = [&](const InputView& view) __attribute__((always_inline)) {
      if (view.channel == 1) {
        prefetch.template operator()<Access::kRead>(view.data, view.batch, view.time);
      } else if (view.data != nullptr && llabs(view.time) == 1) {
        const int64_t lowest = view.time > 0 ? ahead.begin : 1 - ahead.end;
        const T* from = static_cast<const T*>(view.data) + range.batch * view.batch + lowest +
                        channel * view.channel;
        prefetch_part(from, view.channel, count, length, part, parts);
      }
    };
    const auto output = [&](const OutputView& view) __attribute__((always_inline)) {
      prefetch.template operator()<Access::kWrite>(view.data, view.batch, view.time);
    };
    Layout::each(p, input, output);
  }

  bool gated() const { return p.z.data != nullptr; }

  const Params& p;
  ChannelRange range;
  int64_t channels;  // with the last column's empty lanes
  int64_t steps = 0;
  A *tiles, *D, *delta_bias, *A_log2e, *h, *steepest, *largest_exponent, *B, *C;
};

// 2^x, given whether x is known to be within exp2_in_range's range.
template <bool InRange, class V>
[[gnu::always_inline]] inline V decay(V x) {
  return InRange ? exp2_in_range(x) : exp2(x);
}

// Calls kernel(range) for the ranges in work items [begin, end), each with all of the scratch
// memory.
template <class A, class F>
[[gnu::always_inline]] inline void for_each_range(const SelectiveScanInputs& p, int64_t begin,
                                                  int64_t end, Scratch<A>& scratch, F kernel) {
  while (begin < end) {
    const ChannelRange range = channel_range<A>(p, begin, end);
    kernel(range);
    scratch.reset();
    begin += range.blocks;
  }
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
