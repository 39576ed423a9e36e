// SPDX-License-Identifier: Apache-2.0
//
// A work item is a block of channels of one row of the batch. Its time runs in segments, whose
// inputs are first brought into tiles of the accumulator's type; lanes are channels.
#pragma once

#include "../common/simd.h"
#include "params.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {

struct WorkItem {
  int64_t batch, group, block, channel, channels, columns;
};

template <class A>
WorkItem work_item(const SelectiveScanParams& p, int64_t index) {
  const int64_t blocks = selective_scan_blocks_in_group(p), per_group = p.channels / p.groups;
  const int64_t block = index % blocks, group = index / blocks % p.groups;
  const int64_t first = block * kScanChannelBlock;
  const int64_t channels =
      per_group - first < kScanChannelBlock ? per_group - first : kScanChannelBlock;
  return {index / blocks / p.groups, group,    block,
          group * per_group + first, channels, (channels + kLanes<A> - 1) / kLanes<A>};
}

// What forward and backward both keep for a work item. Per channel: vectors, one per column.
// Per state: [state][column]. Per step: [column][step], see simd.h.
template <class T>
struct Tiles {
  using A = Accumulator<T>;
  using V = Vector<A>;
  static constexpr int lanes = kLanes<A>;
  static constexpr int64_t channel_slots = kScanChannelBlock;
  static constexpr int64_t tile_size = kTimeTile * channel_slots;

  static int64_t scratch_size(int64_t d_state) {
    return 6 * tile_size + 2 * channel_slots + 2 * d_state * channel_slots +
           2 * d_state * kTimeTile;
  }

  Tiles(const SelectiveScanParams& p, const WorkItem& item, Scratch<A>& scratch)
      : p(p), item(item) {
    u = scratch.take(tile_size);
    dt = scratch.take(tile_size);
    dt_u = scratch.take(tile_size);
    y = scratch.take(tile_size);
    z = scratch.take(tile_size);
    delta = scratch.take(tile_size);
    D = scratch.take(channel_slots);
    delta_bias = scratch.take(channel_slots);
    A_log2e = scratch.take(p.d_state * channel_slots);
    h = scratch.take(p.d_state * channel_slots);
    B = scratch.take(p.d_state * kTimeTile);
    C = scratch.take(p.d_state * kTimeTile);
    load_channel_parameter(p.D, D);
    load_channel_parameter(p.delta_bias, delta_bias);
    const A* source = static_cast<const A*>(p.A);
    for (int64_t n = 0; n < p.d_state; ++n) {
      for (int64_t c = 0; c < item.columns * lanes; ++c) {
        A_log2e[n * channel_slots + c] =
            c < item.channels ? source[(item.channel + c) * p.d_state + n] * log2e : A(0);
      }
    }
  }

  // A carries log2(e), so that the decay is one exp2.
  static constexpr A log2e = A(1.4426950408889634);

  void load_channel_parameter(const void* source, A* target) {
    for (int64_t c = 0; c < item.columns * lanes; ++c) {
      const bool present = source != nullptr && c < item.channels;
      target[c] = present ? static_cast<const A*>(source)[item.channel + c] : A(0);
    }
  }

  // B or C of the segment: [step][state].
  void load_states_input(const Strided4& input, const Segment& segment, A* target) {
    const T* source =
        static_cast<const T*>(input.data) + item.batch * input.batch + item.group * input.group;
    for (int64_t t = segment.begin; t < segment.end; ++t) {
      for (int64_t n = 0; n < p.d_state; ++n) {
        *target++ = to_accumulator(source[t * input.time + n * input.state]);
      }
    }
  }

  void load(const Segment& segment) {
    steps = segment.end - segment.begin;
    load_tile<T>(p.u, item.batch, segment.begin, steps, item.channel, item.channels, u, kTimeTile);
    load_tile<T>(p.delta, item.batch, segment.begin, steps, item.channel, item.channels, delta,
                 kTimeTile);
    if (p.z.data != nullptr) {
      load_tile<T>(p.z, item.batch, segment.begin, steps, item.channel, item.channels, z,
                   kTimeTile);
    }
    load_states_input(p.B, segment, B);
    load_states_input(p.C, segment, C);
    for (int64_t column = 0; column < item.columns; ++column) {
      const V bias = load_vector<V>(delta_bias + column * lanes);
      const V skip = load_vector<V>(D + column * lanes);
      const bool last = (column + 1) * lanes > item.channels;
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t at = (column * kTimeTile + step) * lanes;
        V dt_step = load_vector<V>(delta + at) + bias;
        store_vector(delta + at, dt_step);
        if (p.delta_softplus) dt_step = softplus(dt_step);
        if (last) dt_step = clear_tail(dt_step);
        const V u_step = load_vector<V>(u + at);
        store_vector(dt + at, dt_step);
        store_vector(dt_u + at, V(dt_step * u_step));
        store_vector(y + at, V(skip * u_step));
      }
    }
  }

  // Lanes past the last channel stay 0: a decay of 1, an input of 0.
  V clear_tail(V v) {
    const int64_t rest = item.channels % lanes;
    if (rest != 0) {
      for (int lane = int(rest); lane < lanes; ++lane) v[lane] = 0;
    }
    return v;
  }

  int64_t state_row(const Segment& segment) const {
    return (item.batch * p.sequences + segment.sequence) * p.channels + item.channel;
  }

  // A state in the layout (row, D, N); absent is 0.
  void load_state(const void* source, const Segment& segment, A* target) {
    const A* state = static_cast<const A*>(source);
    const int64_t row = state_row(segment);
    for (int64_t n = 0; n < p.d_state; ++n) {
      for (int64_t c = 0; c < item.columns * lanes; ++c) {
        const bool present = state != nullptr && c < item.channels;
        target[n * channel_slots + c] = present ? state[(row + c) * p.d_state + n] : A(0);
      }
    }
  }

  void store_state(void* target, const Segment& segment, const A* source) {
    A* state = static_cast<A*>(target);
    const int64_t row = state_row(segment);
    for (int64_t c = 0; c < item.channels; ++c) {
      for (int64_t n = 0; n < p.d_state; ++n) {
        state[(row + c) * p.d_state + n] = source[n * channel_slots + c];
      }
    }
  }

  // The saved state on entering the segment's tile, where the segment begins it.
  A* saved_state(const Segment& segment) const {
    const int64_t tile = segment.begin / kTimeTile;
    return static_cast<A*>(p.saved_states) +
           (item.batch * p.tiles + tile) * p.d_state * p.channels + item.channel;
  }

  const SelectiveScanParams& p;
  WorkItem item;
  int64_t steps = 0;
  A *u, *dt, *dt_u, *y, *z, *delta, *D, *delta_bias, *A_log2e, *h, *B, *C;
};

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
