// SPDX-License-Identifier: Apache-2.0
//
// Work goes by runs of channels of one row of the batch. A run's time goes in segments, and a
// segment in strips of channels, whose inputs are first brought into tiles of the accumulator's
// type; lanes are channels.
#pragma once

#include "common/cpu/tiles.h"
#include "selective_scan/params.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {

// Consecutive blocks of one group: the longer the runs of memory, the better they are prefetched.
struct ChannelRun {
  int64_t batch, group, block, blocks, channel, channels, columns;
};

// Fewer where each channel's steps lie side by side, since each channel is then on its own page.
inline int64_t blocks_at_once(const SelectiveScanParams& p) { return p.u.channel == 1 ? 12 : 2; }

template <class A>
[[gnu::always_inline]] inline ChannelRun channel_run(const SelectiveScanParams& p, int64_t begin,
                                                     int64_t end) {
  const int64_t in_group = selective_scan_blocks_in_group(p), per_group = p.group_channels;
  ChannelRun run;
  run.block = begin % in_group;
  run.group = begin / in_group % p.groups;
  run.batch = begin / in_group / p.groups;
  run.blocks = end - begin < blocks_at_once(p) ? end - begin : blocks_at_once(p);
  if (run.blocks > in_group - run.block) run.blocks = in_group - run.block;
  const int64_t first = run.block * kScanChannelBlock, rest = per_group - first;
  run.channel = run.group * per_group + first;
  run.channels = rest < run.blocks * kScanChannelBlock ? rest : run.blocks * kScanChannelBlock;
  run.columns = (run.channels + kLanes<A> - 1) / kLanes<A>;
  return run;
}

// The tiles of a strip's steps. The forward keeps dt and dt * u in the places of delta and u.
struct ForwardTiles {
  static constexpr int64_t kStripChannels = 256;
  enum { kU, kDelta, kY, kZ, kCount, kDt = kDelta, kDtU = kU };
};
struct BackwardTiles {
  static constexpr int64_t kStripChannels = kScanChannelBlock;
  // kDelta: once loaded, dt's derivative by delta; kDy: the gradient of y before the gate; kGB:
  // sum_n g B; kGA: sum_n A a g h_{t-1}.
  enum { kU, kDelta, kY, kZ, kDt, kDtU, kDy, kGB, kGA, kCount };
};

// Per channel: [column][lane]. Per state and channel: [state][column][lane]. B and C:
// [step][state]. Per step: [column][tile][step][lane].
template <class T, class Which>
struct Tiles {
  using A = Accumulator<T>;
  using V = Vector<A>;
  using IntScalar = typename VectorTraits<V>::IntScalar;
  static constexpr int lanes = kLanes<A>;
  // One row more than there are steps: the processor confuses addresses that are the same within
  // 4096 bytes, as those of one step in two tiles would else be.
  static constexpr int64_t rows = kScanTimeTile + 1;
  static constexpr int64_t strip_columns = Which::kStripChannels / lanes;
  static constexpr TileStrides strides{Which::kCount * rows * lanes, lanes};

  // The most channels that a run has, in whole columns.
  static int64_t max_channels(const SelectiveScanParams& p) {
    const int64_t per_group = (p.group_channels + lanes - 1) / lanes * lanes;
    const int64_t at_once = blocks_at_once(p) * kScanChannelBlock;
    return per_group < at_once ? per_group : at_once;
  }

  static int64_t scratch_size(const SelectiveScanParams& p) {
    return strip_columns * strides.column + max_channels(p) * (4 + 2 * p.d_state) +
           2 * p.d_state * kScanTimeTile;
  }

  Tiles(const SelectiveScanParams& p, const ChannelRun& run, Scratch<A>& scratch)
      : p(p), run(run), channels(run.columns * lanes) {
    tiles = scratch.take(strip_columns * strides.column);
    D = scratch.take(channels);
    delta_bias = scratch.take(channels);
    A_log2e = scratch.take(p.d_state * channels);
    h = scratch.take(p.d_state * channels);
    steepest = scratch.take(channels);
    largest_exponent = scratch.take(channels);
    B = scratch.take(p.d_state * kScanTimeTile);
    C = scratch.take(p.d_state * kScanTimeTile);
    load_channel_parameter(p.D, D);
    load_channel_parameter(p.delta_bias, delta_bias);
    // A carries log2(e), so that the decay is one exp2.
    load_by_state(p.A, run.channel, A_log2e);
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

  // A column's rows of one tile, while its strip is worked on.
  A* column(int64_t column, int which) const {
    return tiles + column % strip_columns * strides.column + which * rows * lanes;
  }

  // The strip that begins with column `first`: the column after its last, and its channels.
  int64_t strip_end(int64_t first) const {
    return first + strip_columns < run.columns ? first + strip_columns : run.columns;
  }
  int64_t channels_in_strip(int64_t first) const {
    const int64_t rest = run.channels - first * lanes;
    return rest < Which::kStripChannels ? rest : Which::kStripChannels;
  }

  void load_channel_parameter(const void* source, A* target) const {
    for (int64_t c = 0; c < channels; ++c) {
      const bool present = source != nullptr && c < run.channels;
      target[c] = present ? static_cast<const A*>(source)[run.channel + c] : A(0);
    }
  }

  // From the layout (row, N), `row` being the run's first; absent is 0.
  void load_by_state(const void* source, int64_t row, A* target) const {
    for (int64_t n = 0; n < p.d_state; ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        const bool present = source != nullptr && c < run.channels;
        target[n * channels + c] =
            present ? static_cast<const A*>(source)[(row + c) * p.d_state + n] : A(0);
      }
    }
  }

  void store_by_state(const A* source, int64_t row, void* target) const {
    for (int64_t c = 0; c < run.channels; ++c) {
      for (int64_t n = 0; n < p.d_state; ++n) {
        static_cast<A*>(target)[(row + c) * p.d_state + n] = source[n * channels + c];
      }
    }
  }

  // The row of a state that belongs to the segment's sequence.
  int64_t state_row(const Segment& segment) const {
    return (run.batch * p.sequences + segment.sequence) * p.channels + run.channel;
  }

  // The saved state on entering the segment's tile, where the segment begins it.
  A* saved_state(const Segment& segment) const {
    const int64_t row = run.batch * p.tiles + segment.begin / kScanTimeTile;
    return static_cast<A*>(p.saved_states) + row * p.d_state * p.channels + run.channel;
  }

  void load_input(const Strided3& input, const Segment& segment, int64_t first, int which) const {
    load_tile<T>(input, run.batch, segment.begin, steps, run.channel + first * lanes,
                 channels_in_strip(first), column(first, which), strides);
  }

  void load_input(const Strided4& input, const Segment& segment, A* target) const {
    const T* source =
        static_cast<const T*>(input.data) + run.batch * input.batch + run.group * input.group;
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
                    const Strided3Out& output) const {
    store_tile<T>(output, run.batch, segment.begin, steps, run.channel + first * lanes,
                  channels_in_strip(first), column(first, which), strides);
  }

  // Brings in the segment's inputs that all strips share.
  void load(const Segment& segment) {
    steps = segment.end - segment.begin;
    load_input(p.B, segment, B);
    load_input(p.C, segment, C);
  }

  void load_strip(const Segment& segment, int64_t first) const {
    load_input(p.u, segment, first, Which::kU);
    load_input(p.delta, segment, first, Which::kDelta);
    if (gated()) load_input(p.z, segment, first, Which::kZ);
    for (int64_t column = first; column < strip_end(first); ++column) prepare_column(column);
  }

  // Of a loaded column, what is the same for all states; y begins as D u.
  void prepare_column(int64_t c) const {
    using Int = typename VectorTraits<V>::Int;
    const V bias = load_vector<V>(delta_bias + c * lanes), skip = load_vector<V>(D + c * lanes);
    A *u = column(c, Which::kU), *delta = column(c, Which::kDelta), *y = column(c, Which::kY);
    A *dt = column(c, Which::kDt), *dt_u = column(c, Which::kDtU);
    Int largest_dt{};  // as bits without the sign, of which a NaN's are the largest
    for (int64_t at = 0; at < steps * lanes; at += lanes) {
      const V biased = load_vector<V>(delta + at) + bias, u_step = load_vector<V>(u + at);
      V dt_step = biased, derivative = V{} + A(1);
      if (p.delta_softplus) {
        const Softplus<V> softplus = softplus_with_derivative(biased);
        dt_step = softplus.value;
        derivative = softplus.derivative;
      }
      if constexpr (Which::kDelta != Which::kDt) store_vector(delta + at, derivative);
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

  // Asks for a part of the rows of the strip that comes after the one that begins with column
  // `first`, perhaps in the next segment: memory and arithmetic then take their time side by side.
  [[gnu::always_inline]] void prefetch_next(const Segment& segment, const Segment* next,
                                            int64_t first, int64_t part, int64_t parts) const {
    const bool last = strip_end(first) == run.columns;
    if (last && next == nullptr) return;
    const Segment& ahead = last ? *next : segment;
    const int64_t column = last ? 0 : strip_end(first);
    const int64_t channel = run.channel + column * lanes, count = channels_in_strip(column);
    const int64_t length = ahead.end - ahead.begin;
    const auto ask = [&]<Access Use>(const void* data, int64_t batch,
                                     int64_t time) __attribute__((always_inline)) {
      if (data == nullptr) return;
      for (int64_t row = length * part / parts; row < length * (part + 1) / parts; ++row) {
        prefetch_row<T, Use>(data, run.batch * batch + (ahead.begin + row) * time + channel, count);
      }
    };
    for (const Strided3* input : {&p.u, &p.delta, &p.z, &p.dy}) {
      if (input->channel == 1) {
        ask.template operator()<Access::kRead>(input->data, input->batch, input->time);
      } else if (input->data != nullptr && llabs(input->time) == 1) {
        const int64_t lowest = input->time > 0 ? ahead.begin : 1 - ahead.end;
        const T* from = static_cast<const T*>(input->data) + run.batch * input->batch + lowest +
                        channel * input->channel;
        prefetch_part(from, input->channel, count, length, part, parts);
      }
    }
    for (const Strided3Out* output : {&p.y, &p.du, &p.ddelta, &p.dz}) {
      ask.template operator()<Access::kWrite>(output->data, output->batch, output->time);
    }
  }

  bool gated() const { return p.z.data != nullptr; }

  const SelectiveScanParams& p;
  ChannelRun run;
  int64_t channels;  // with the last column's empty lanes
  int64_t steps = 0;
  A *tiles, *D, *delta_bias, *A_log2e, *h, *steepest, *largest_exponent, *B, *C;
};

// 2^x, given whether x is known to be within exp2_in_range's range.
template <bool InRange, class V>
[[gnu::always_inline]] inline V decay(V x) {
  return InRange ? exp2_in_range(x) : exp2(x);
}

// Calls kernel(run, scratch) for the runs in work items [begin, end), each with fresh scratch.
template <class A, class F>
[[gnu::always_inline]] inline void for_each_run(const SelectiveScanParams& p, int64_t begin,
                                                int64_t end, Scratch<A>& scratch, F kernel) {
  while (begin < end) {
    const ChannelRun run = channel_run<A>(p, begin, end);
    kernel(run);
    scratch.take_all_back();
    begin += run.blocks;
  }
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
