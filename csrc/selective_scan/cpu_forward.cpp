// SPDX-License-Identifier: Apache-2.0
#include "cpu_tiles.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {
namespace {

// States are advanced this many at a time, to load each step's inputs once for all of them.
constexpr int kStatesAtOnce = 4;

// Advances `Count` states from n of one column through the segment, adding C . h to y.
template <int Count, class T>
void advance_states(Tiles<T>& tiles, int64_t n, int64_t column) {
  using V = typename Tiles<T>::V;
  constexpr int lanes = Tiles<T>::lanes;
  const int64_t d_state = tiles.p.d_state, first = column * kTimeTile * lanes;
  const auto *dt = tiles.dt + first, *dt_u = tiles.dt_u + first;
  auto* y = tiles.y + first;
  const auto *B = tiles.B + n, *C = tiles.C + n;
  V A_log2e[Count], h[Count];
  for (int i = 0; i < Count; ++i) {
    const int64_t at = (n + i) * Tiles<T>::channel_slots + column * lanes;
    A_log2e[i] = load_vector<V>(tiles.A_log2e + at);
    h[i] = load_vector<V>(tiles.h + at);
  }
  for (int64_t step = 0; step < tiles.steps; ++step) {
    const V dt_step = load_vector<V>(dt + step * lanes);
    const V dt_u_step = load_vector<V>(dt_u + step * lanes);
    V y_step = load_vector<V>(y + step * lanes);
    for (int i = 0; i < Count; ++i) {
      h[i] = exp2(V(dt_step * A_log2e[i])) * h[i] + dt_u_step * B[step * d_state + i];
      y_step += h[i] * C[step * d_state + i];
    }
    store_vector(y + step * lanes, y_step);
  }
  for (int i = 0; i < Count; ++i) {
    store_vector(tiles.h + (n + i) * Tiles<T>::channel_slots + column * lanes, h[i]);
  }
}

template <class T>
void forward_item(const SelectiveScanParams& p, int64_t index, Scratch<Accumulator<T>>& scratch) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  Tiles<T> tiles(p, work_item<A>(p, index), scratch);
  const WorkItem& item = tiles.item;
  for (int64_t s = 0; s < p.segment_count; ++s) {
    const Segment& segment = p.segments[s];
    if (segment.starts()) tiles.load_state(p.initial_state, segment, tiles.h);
    if (segment.begin < segment.end) {
      if (p.saved_states != nullptr && segment.begin % kTimeTile == 0) {
        A* saved = tiles.saved_state(segment);
        for (int64_t n = 0; n < p.d_state; ++n) {
          memcpy(saved + n * p.channels, tiles.h + n * tiles.channel_slots,
                 item.channels * sizeof(A));
        }
      }
      tiles.load(segment);
      int64_t n = 0;
      for (; n + kStatesAtOnce <= p.d_state; n += kStatesAtOnce) {
        for (int64_t column = 0; column < item.columns; ++column) {
          advance_states<kStatesAtOnce>(tiles, n, column);
        }
      }
      for (; n < p.d_state; ++n) {
        for (int64_t column = 0; column < item.columns; ++column) {
          advance_states<1>(tiles, n, column);
        }
      }
      if (p.z.data != nullptr) {
        for (int64_t column = 0; column < item.columns; ++column) {
          for (int64_t step = 0; step < tiles.steps; ++step) {
            const int64_t at = (column * kTimeTile + step) * lanes;
            const V gate = silu(load_vector<V>(tiles.z + at));
            store_vector(tiles.y + at, V(load_vector<V>(tiles.y + at) * gate));
          }
        }
      }
      store_tile<T>(p.y, item.batch, segment.begin, tiles.steps, item.channel, item.channels,
                    tiles.y, kTimeTile);
    }
    if (segment.ends()) tiles.store_state(p.final_state, segment, tiles.h);
  }
}

}  // namespace

void selective_scan_forward(const SelectiveScanParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t size = Tiles<T>::scratch_size(p.d_state);
    for (int64_t index = begin; index < end; ++index) {
      Scratch<Accumulator<T>> scratch(size);
      forward_item<T>(p, index, scratch);
    }
  });
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
