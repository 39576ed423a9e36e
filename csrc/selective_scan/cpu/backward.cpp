// SPDX-License-Identifier: Apache-2.0
//
// Segments are visited from the last to the first. The states of each are recomputed from the saved
// one, then the gradient g of the state goes back through them:
//   g_t = C_t dy_t + a_{t+1} g_{t+1}
#include "selective_scan/cpu/tiles.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {
namespace {

// States processed together; more of them no longer fit the first-level cache.
constexpr int kStatesAtOnce = 4;

// What these states store for each step of one column: h, a, and, summed over a block's columns, dB
// and dC before the sum over lanes.
enum { kState, kDecay, kDB, kDC, kWork };

template <class T>
struct Backward : Tiles<T, BackwardTiles> {
  using A = Accumulator<T>;
  using Base = Tiles<T, BackwardTiles>;
  using Base::channels, Base::lanes;
  static constexpr int64_t work_size = kScanTimeTile * kStatesAtOnce * kWork * lanes;

  static int64_t scratch_size(const SelectiveScanBackward& p) {
    return Base::scratch_size(p) + Base::max_channels(p) * (2 + 2 * p.d_state) + work_size;
  }

  Backward(const SelectiveScanBackward& p, const ChannelRange& range, Scratch<A>& scratch)
      : Base(p, range, scratch) {
    a_g = scratch.take(p.d_state * channels);
    dA = scratch.take(p.d_state * channels);
    dD = scratch.take(channels);
    ddelta_bias = scratch.take(channels);
    work = scratch.take(work_size);
    for (int64_t i = 0; i < p.d_state * channels; ++i) dA[i] = 0;
    for (int64_t i = 0; i < channels; ++i) dD[i] = ddelta_bias[i] = 0;
  }

  // Per state: a_{t+1} g_{t+1}, and dA. Per channel: dD and ddelta_bias. [step][state][kWork]:
  // work.
  A *a_g, *dA, *dD, *ddelta_bias, *work;
};

// h of `Count` states from n of one column over the segment, with C . h added to y where it is
// gated. The first column of a block clears the sums of dB and dC.
template <int Count, bool InRange, class T>
void recompute_states(Backward<T>& tiles, int64_t n, int64_t column, bool first) {
  using V = typename Backward<T>::V;
  constexpr int lanes = Backward<T>::lanes;
  const int64_t d_state = tiles.p.d_state;
  const auto *dt = tiles.column(column, BackwardTiles::kDt),
             *dt_u = tiles.column(column, BackwardTiles::kDtU),
             *dy = tiles.column(column, BackwardTiles::kDy);
  auto *y = tiles.column(column, BackwardTiles::kY), *work = tiles.work;
  const auto *B = tiles.B + n, *C = tiles.C + n;
  V A_log2e[Count], h[Count];
  for (int i = 0; i < Count; ++i) {
    const int64_t at = (n + i) * tiles.channels + column * lanes;
    A_log2e[i] = load_vector<V>(tiles.A_log2e + at);
    h[i] = load_vector<V>(tiles.h + at);
  }
  const bool gated = tiles.gated();
  for (int64_t step = 0; step < tiles.steps; ++step) {
    const V dt_step = load_vector<V>(dt + step * lanes);
    const V dt_u_step = load_vector<V>(dt_u + step * lanes);
    const V dy_step = load_vector<V>(dy + step * lanes);
    V y_step{};
    for (int i = 0; i < Count; ++i, work += kWork * lanes) {
      const V a = decay<InRange>(V(dt_step * A_log2e[i]));
      h[i] = a * h[i] + dt_u_step * B[step * d_state + i];
      y_step += h[i] * C[step * d_state + i];
      store_vector(work + kDecay * lanes, a);
      store_vector(work + kState * lanes, h[i]);
      auto* dC = work + kDC * lanes;
      if (first) {
        store_vector(work + kDB * lanes, V{});
        store_vector(dC, V(dy_step * h[i]));
      } else {
        store_vector(dC, V(load_vector<V>(dC) + dy_step * h[i]));
      }
    }
    if (gated) store_vector(y + step * lanes, V(load_vector<V>(y + step * lanes) + y_step));
  }
}

template <int Count, class T>
void reverse_states(Backward<T>& tiles, int64_t n, int64_t column) {
  using V = typename Backward<T>::V;
  constexpr int lanes = Backward<T>::lanes, row = Count * kWork * lanes;
  constexpr auto ln2 = ScalarOf<V>(0.69314718055994531);
  const int64_t d_state = tiles.p.d_state;
  const auto *dt = tiles.column(column, BackwardTiles::kDt),
             *dt_u = tiles.column(column, BackwardTiles::kDtU),
             *dy = tiles.column(column, BackwardTiles::kDy);
  auto *g_B = tiles.column(column, BackwardTiles::kGB),
       *g_A = tiles.column(column, BackwardTiles::kGA);
  const auto *B = tiles.B + n, *C = tiles.C + n;
  auto* work = tiles.work + (tiles.steps - 1) * row;
  V A_values[Count], a_g[Count], dA[Count], h_before[Count];
  for (int i = 0; i < Count; ++i) {
    const int64_t at = (n + i) * tiles.channels + column * lanes;
    A_values[i] = load_vector<V>(tiles.A_log2e + at) * ln2;
    a_g[i] = load_vector<V>(tiles.a_g + at);
    dA[i] = load_vector<V>(tiles.dA + at);
    h_before[i] = load_vector<V>(tiles.h + at);
  }
  const auto reverse_step = [&](int64_t step, const V* previous) __attribute__((always_inline)) {
    const V dt_step = load_vector<V>(dt + step * lanes);
    const V dt_u_step = load_vector<V>(dt_u + step * lanes);
    const V dy_step = load_vector<V>(dy + step * lanes);
    V g_B_step = load_vector<V>(g_B + step * lanes), g_A_step = load_vector<V>(g_A + step * lanes);
    for (int i = 0; i < Count; ++i) {
      auto* at = work + i * kWork * lanes;
      const V g = dy_step * C[step * d_state + i] + a_g[i];
      store_vector(at + kDB * lanes, V(load_vector<V>(at + kDB * lanes) + g * dt_u_step));
      g_B_step += g * B[step * d_state + i];
      a_g[i] = g * load_vector<V>(at + kDecay * lanes);
      const V a_g_h = a_g[i] * previous[i];
      g_A_step += a_g_h * A_values[i];
      dA[i] += a_g_h * dt_step;
    }
    store_vector(g_B + step * lanes, g_B_step);
    store_vector(g_A + step * lanes, g_A_step);
    work -= row;
  };
  for (int64_t step = tiles.steps - 1; step > 0; --step) {
    V previous[Count];
    for (int i = 0; i < Count; ++i) {
      previous[i] = load_vector<V>(work - row + (i * kWork + kState) * lanes);
    }
    reverse_step(step, previous);
  }
  reverse_step(0, h_before);
  for (int i = 0; i < Count; ++i) {
    const int64_t at = (n + i) * tiles.channels + column * lanes;
    store_vector(tiles.a_g + at, a_g[i]);
    store_vector(tiles.dA + at, dA[i]);
  }
}

// Sums work's dB or dC over lanes into the block's partial sums of [step][state].
template <int Count, class T>
void store_sums(const Backward<T>& tiles, const Segment& segment, int64_t block, int64_t n,
                int which, const OutputView& partial) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>, stride = kWork * lanes;
  A* target = static_cast<A*>(partial.data) +
              (block * tiles.p.batch + tiles.range.batch) * partial.batch +
              segment.begin * partial.time + tiles.range.group * tiles.p.d_state + n;
  const A* work = tiles.work + which * lanes;
  const int64_t count = tiles.steps * Count, whole = count / lanes * lanes;
  for (int64_t first = 0; first < count; first += lanes) {
    A sums[lanes];
    if (first < whole) {
      store_vector(sums, sums_of_vectors<V>(work + first * stride, stride));
    } else {
      for (int64_t i = first; i < count; ++i) {
        sums[i - first] = sum_lanes(load_vector<V>(work + i * stride));
      }
    }
    for (int64_t i = first; i < count && i < first + lanes; ++i) {
      target[i / Count * partial.time + i % Count] = sums[i - first];
    }
  }
}

template <int Count, class T>
void backward_states(Backward<T>& tiles, const Segment& segment, const Segment* next, int64_t first,
                     int64_t n) {
  for (int64_t column = first; column < tiles.strip_end(first); ++column) {
    tiles.prefetch_next(segment, next, first, n / Count * tiles.strip_columns + column - first,
                        tiles.p.d_state / Count * tiles.strip_columns);
    tiles.exponents_in_range(column)
        ? recompute_states<Count, true>(tiles, n, column, column == first)
        : recompute_states<Count, false>(tiles, n, column, column == first);
    reverse_states<Count>(tiles, n, column);
  }
  const int64_t block = tiles.range.block + first / tiles.strip_columns;
  store_sums<Count>(tiles, segment, block, n, kDB, tiles.p.dB_partial);
  store_sums<Count>(tiles, segment, block, n, kDC, tiles.p.dC_partial);
}

// Before the states: the gradient of y before the gate.
template <class T>
void prepare_gradient(Backward<T>& tiles, const Segment& segment, int64_t first) {
  using V = typename Backward<T>::V;
  constexpr int lanes = Backward<T>::lanes;
  tiles.load_input(tiles.p.dy, segment, first, BackwardTiles::kDy);
  for (int64_t c = first; c < tiles.strip_end(first); ++c) {
    auto *z = tiles.column(c, BackwardTiles::kZ), *dy = tiles.column(c, BackwardTiles::kDy);
    auto *g_B = tiles.column(c, BackwardTiles::kGB), *g_A = tiles.column(c, BackwardTiles::kGA);
    const auto* u = tiles.column(c, BackwardTiles::kU);
    V dD = load_vector<V>(tiles.dD + c * lanes);
    for (int64_t at = 0; at < tiles.steps * lanes; at += lanes) {
      V dy_step = load_vector<V>(dy + at);
      if (tiles.gated()) {
        const V z_step = load_vector<V>(z + at), gate = sigmoid(z_step);
        // z's tile now holds dz but for the factor y.
        store_vector(z + at, V(dy_step * silu_derivative(z_step, gate)));
        dy_step *= z_step * gate;
        store_vector(dy + at, dy_step);
      }
      dD += dy_step * load_vector<V>(u + at);
      store_vector(g_B + at, V{});
      store_vector(g_A + at, V{});
    }
    store_vector(tiles.dD + c * lanes, dD);
  }
}

// After the states: du, ddelta and dz of the strip, in the places of u, g_A and z.
template <class T>
void finish_gradient(Backward<T>& tiles, const Segment& segment, int64_t first) {
  using V = typename Backward<T>::V;
  constexpr int lanes = Backward<T>::lanes;
  const SelectiveScanBackward& p = tiles.p;
  for (int64_t c = first; c < tiles.strip_end(first); ++c) {
    auto *u = tiles.column(c, BackwardTiles::kU), *g_A = tiles.column(c, BackwardTiles::kGA);
    auto* z = tiles.column(c, BackwardTiles::kZ);
    const auto *g_B = tiles.column(c, BackwardTiles::kGB),
               *dt = tiles.column(c, BackwardTiles::kDt),
               *delta = tiles.column(c, BackwardTiles::kDelta),
               *dy = tiles.column(c, BackwardTiles::kDy), *y = tiles.column(c, BackwardTiles::kY);
    const V skip = load_vector<V>(tiles.D + c * lanes);
    V ddelta_bias = load_vector<V>(tiles.ddelta_bias + c * lanes);
    for (int64_t at = 0; at < tiles.steps * lanes; at += lanes) {
      const V g_B_step = load_vector<V>(g_B + at), u_step = load_vector<V>(u + at);
      const V ddelta = (g_B_step * u_step + load_vector<V>(g_A + at)) * load_vector<V>(delta + at);
      ddelta_bias += ddelta;
      store_vector(g_A + at, ddelta);
      const V du = g_B_step * load_vector<V>(dt + at) + skip * load_vector<V>(dy + at);
      store_vector(u + at, du);
      if (tiles.gated()) store_vector(z + at, V(load_vector<V>(z + at) * load_vector<V>(y + at)));
    }
    store_vector(tiles.ddelta_bias + c * lanes, ddelta_bias);
  }
  tiles.store_output(BackwardTiles::kU, segment, first, p.du);
  tiles.store_output(BackwardTiles::kGA, segment, first, p.ddelta);
  if (tiles.gated()) tiles.store_output(BackwardTiles::kZ, segment, first, p.dz);
}

template <class T>
void backward_segment(Backward<T>& tiles, const Segment& segment, const Segment* next) {
  const SelectiveScanBackward& p = tiles.p;
  if (segment.begin % kScanTimeTile == 0) {
    const auto* saved =
        static_cast<const Accumulator<T>*>(p.saved_states) + tiles.saved_offset(segment);
    for (int64_t n = 0; n < p.d_state; ++n) {
      auto* h = tiles.h + n * tiles.channels;
      memset(h + tiles.range.channels, 0, (tiles.channels - tiles.range.channels) * sizeof *h);
      memcpy(h, saved + n * p.channels, tiles.range.channels * sizeof *h);
    }
  } else {
    tiles.load_by_state(p.initial_state, tiles.state_row(segment), tiles.h);
  }
  tiles.load(segment);
  for (int64_t first = 0; first < tiles.range.columns; first += tiles.strip_columns) {
    tiles.load_strip(segment, first);
    prepare_gradient(tiles, segment, first);
    int64_t n = 0;
    for (; n + kStatesAtOnce <= p.d_state; n += kStatesAtOnce) {
      backward_states<kStatesAtOnce>(tiles, segment, next, first, n);
    }
    for (; n < p.d_state; ++n) backward_states<1>(tiles, segment, next, first, n);
    finish_gradient(tiles, segment, first);
  }
}

template <class T>
void backward_range(Backward<T> tiles, RowSegments segments) {
  using A = Accumulator<T>;
  const SelectiveScanBackward& p = tiles.p;
  const ChannelRange& range = tiles.range;
  for (int64_t s = segments.count - 1; s >= 0; --s) {
    const Segment& segment = segments.data[s];
    const int64_t row = tiles.state_row(segment);
    if (segment.ends()) tiles.load_by_state(p.dfinal_state, row, tiles.a_g);
    if (segment.begin < segment.end) {
      backward_segment(tiles, segment, s > 0 ? &segment - 1 : nullptr);
    }
    if (segment.starts() && p.dinitial_state != nullptr) {
      tiles.store_by_state(tiles.a_g, row, p.dinitial_state);
    }
  }
  const int64_t row = range.batch * p.channels + range.channel;
  tiles.store_by_state(tiles.dA, row, p.dA_partial);
  memcpy(static_cast<A*>(p.dD_partial) + row, tiles.dD, range.channels * sizeof(A));
  memcpy(static_cast<A*>(p.ddelta_bias_partial) + row, tiles.ddelta_bias,
         range.channels * sizeof(A));
}

}  // namespace

void selective_scan_backward(const SelectiveScanBackward& p, RowSegments segments, int64_t begin,
                             int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    Scratch<Accumulator<T>> scratch(Backward<T>::scratch_size(p));
    for_each_range(p, begin, end, scratch, [&](const ChannelRange& range) {
      backward_range(Backward<T>(p, range, scratch), segments);
    });
  });
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
