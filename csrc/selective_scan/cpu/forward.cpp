// SPDX-License-Identifier: Apache-2.0
#include "selective_scan/cpu/tiles.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {
namespace {

// States are advanced this many at a time, to load each step's inputs once for all of them.
constexpr int kStatesAtOnce = 4;

template <class T>
using Forward = Tiles<T, ForwardTiles>;

// Advances `Count` states from n of one column through the segment, adding C . h to y.
template <int Count, bool InRange, class T>
void advance_states(Forward<T>& tiles, int64_t n, int64_t column) {
  using V = typename Forward<T>::V;
  constexpr int lanes = Forward<T>::lanes;
  const int64_t d_state = tiles.p.d_state;
  const auto *dt = tiles.column(column, ForwardTiles::kDt),
             *dt_u = tiles.column(column, ForwardTiles::kDtU);
  auto* y = tiles.column(column, ForwardTiles::kY);
  const auto *B = tiles.B + n, *C = tiles.C + n;
  V A_log2e[Count], h[Count];
  for (int i = 0; i < Count; ++i) {
    const int64_t at = (n + i) * tiles.channels + column * lanes;
    A_log2e[i] = load_vector<V>(tiles.A_log2e + at);
    h[i] = load_vector<V>(tiles.h + at);
  }
  for (int64_t step = 0; step < tiles.steps; ++step) {
    const V dt_step = load_vector<V>(dt + step * lanes);
    const V dt_u_step = load_vector<V>(dt_u + step * lanes);
    V y_step = load_vector<V>(y + step * lanes);
    for (int i = 0; i < Count; ++i) {
      h[i] = decay<InRange>(V(dt_step * A_log2e[i])) * h[i] + dt_u_step * B[step * d_state + i];
      y_step += h[i] * C[step * d_state + i];
    }
    store_vector(y + step * lanes, y_step);
  }
  for (int i = 0; i < Count; ++i) {
    store_vector(tiles.h + (n + i) * tiles.channels + column * lanes, h[i]);
  }
}

template <bool InRange, class T>
void advance_column(Forward<T>& tiles, int64_t column) {
  int64_t n = 0;
  for (; n + kStatesAtOnce <= tiles.p.d_state; n += kStatesAtOnce) {
    advance_states<kStatesAtOnce, InRange>(tiles, n, column);
  }
  for (; n < tiles.p.d_state; ++n) advance_states<1, InRange>(tiles, n, column);
}

template <class T>
void forward_column(Forward<T>& tiles, int64_t column) {
  using V = typename Forward<T>::V;
  tiles.exponents_in_range(column) ? advance_column<true>(tiles, column)
                                   : advance_column<false>(tiles, column);
  if (!tiles.gated()) return;
  const auto* z = tiles.column(column, ForwardTiles::kZ);
  auto* y = tiles.column(column, ForwardTiles::kY);
  for (int64_t at = 0; at < tiles.steps * tiles.lanes; at += tiles.lanes) {
    store_vector(y + at, V(load_vector<V>(y + at) * silu(load_vector<V>(z + at))));
  }
}

template <class T>
void forward_segment(Forward<T>& tiles, const Segment& segment, const Segment* next) {
  const SelectiveScanForward& p = tiles.p;
  const ChannelRange& range = tiles.range;
  if (p.saved_states != nullptr && segment.begin % kScanTimeTile == 0) {
    auto* saved = static_cast<Accumulator<T>*>(p.saved_states) + tiles.saved_offset(segment);
    for (int64_t n = 0; n < p.d_state; ++n) {
      memcpy(saved + n * p.channels, tiles.h + n * tiles.channels, range.channels * sizeof *saved);
    }
  }
  tiles.load(segment);
  for (int64_t first = 0; first < range.columns; first += tiles.strip_columns) {
    tiles.load_strip(segment, first);
    for (int64_t c = first; c < tiles.strip_end(first); ++c) {
      tiles.prefetch_next(segment, next, first, c - first, tiles.strip_columns);
      forward_column(tiles, c);
    }
    tiles.store_output(ForwardTiles::kY, segment, first, p.y);
  }
}

template <class T>
void forward_range(Forward<T> tiles, RowSegments segments) {
  const SelectiveScanForward& p = tiles.p;
  for (int64_t s = 0; s < segments.count; ++s) {
    const Segment& segment = segments.data[s];
    const int64_t row = tiles.state_row(segment);
    if (segment.starts()) tiles.load_by_state(p.initial_state, row, tiles.h);
    if (segment.begin < segment.end) {
      forward_segment(tiles, segment, s + 1 < segments.count ? &segment + 1 : nullptr);
    }
    if (segment.ends()) tiles.store_by_state(tiles.h, row, p.final_state);
  }
}

}  // namespace

void selective_scan_forward(const SelectiveScanForward& p, RowSegments segments, int64_t begin,
                            int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    Scratch<Accumulator<T>> scratch(Forward<T>::scratch_size(p));
    for_each_range(p, begin, end, scratch, [&](const ChannelRange& range) {
      forward_range(Forward<T>(p, range, scratch), segments);
    });
  });
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
