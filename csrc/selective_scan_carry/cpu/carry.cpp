// SPDX-License-Identifier: Apache-2.0
//
// Forward, h_t = a_t h_{t-1} + dt_t u_t B_t, without y. Backward, from the last step to the first,
// x_t = a_t (x_{t+1} + C_t dy_t), whose last is the gradient of the initial state.
#include "selective_scan/cpu/tiles.h"
#include "selective_scan_carry/cpu/kernels.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {
namespace {

// As many as the forward scan's.
constexpr int kStatesAtOnce = 4;

// kInput: u, then dt u; or dy, then the gradient of y before the gate. kDt: delta, then dt.
struct CarryTiles {
  using Params = SelectiveScanCarry;
  static constexpr int64_t kStripChannels = 256;
  enum { kInput, kDt, kZ, kCount };

  template <class Input, class Output>
  [[gnu::always_inline]] static void each(const Params& p, Input input, Output) {
    for (const InputView* view : {&p.u, &p.delta, &p.z}) input(*view);
  }
};

template <class T>
struct Carry : Tiles<T, CarryTiles> {
  using A = Accumulator<T>;
  using Base = Tiles<T, CarryTiles>;
  using Base::Base;

  static int64_t scratch_size(const SelectiveScanCarry& p) {
    return Base::scratch_size(p) + Base::max_channels(p);
  }

  A* dt_sum;  // per channel
};

// Of a loaded column: dt, its sum, and what enters the state but for B or C.
template <bool kBackward, class T>
void prepare_column(Carry<T>& tiles, int64_t c) {
  using V = typename Carry<T>::V;
  using Int = typename VectorTraits<V>::Int;
  constexpr int lanes = Carry<T>::lanes;
  const V bias = load_vector<V>(tiles.delta_bias + c * lanes);
  auto *input = tiles.column(c, CarryTiles::kInput), *dt = tiles.column(c, CarryTiles::kDt);
  const auto* z = tiles.column(c, CarryTiles::kZ);
  V sum{};
  Int largest_dt{};  // as bits without the sign, of which a NaN's are the largest
  for (int64_t at = 0; at < tiles.steps * lanes; at += lanes) {
    const V biased = load_vector<V>(dt + at) + bias;
    const V dt_step = tiles.p.delta_softplus ? softplus(biased) : biased;
    V entering = load_vector<V>(input + at);
    if constexpr (kBackward) {
      if (tiles.gated()) entering *= silu(load_vector<V>(z + at));
    } else {
      entering *= dt_step;
    }
    store_vector(input + at, entering);
    store_vector(dt + at, dt_step);
    sum += dt_step;
    using IntScalar = typename VectorTraits<V>::IntScalar;
    const Int bits = __builtin_bit_cast(Int, dt_step) & std::numeric_limits<IntScalar>::max();
    largest_dt = bits > largest_dt ? bits : largest_dt;
  }
  auto* total = tiles.dt_sum + c * lanes;
  store_vector(total, V(load_vector<V>(total) + sum));
  const V steepness = load_vector<V>(tiles.steepest + c * lanes);
  store_vector(tiles.largest_exponent + c * lanes,
               V(steepness * __builtin_bit_cast(V, largest_dt)));
}

// `Count` states from n of one column through the segment.
template <bool kBackward, int Count, bool InRange, class T>
void advance_states(Carry<T>& tiles, int64_t n, int64_t column) {
  using V = typename Carry<T>::V;
  constexpr int lanes = Carry<T>::lanes;
  const int64_t d_state = tiles.p.d_state, steps = tiles.steps;
  const auto *dt = tiles.column(column, CarryTiles::kDt),
             *input = tiles.column(column, CarryTiles::kInput);
  const auto* B_or_C = tiles.B + n;
  V A_log2e[Count], h[Count];
  for (int i = 0; i < Count; ++i) {
    const int64_t at = (n + i) * tiles.channels + column * lanes;
    A_log2e[i] = load_vector<V>(tiles.A_log2e + at);
    h[i] = load_vector<V>(tiles.h + at);
  }
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t step = kBackward ? steps - 1 - i : i;
    const V dt_step = load_vector<V>(dt + step * lanes);
    const V entering = load_vector<V>(input + step * lanes);
    for (int i = 0; i < Count; ++i) {
      const V a = decay<InRange>(V(dt_step * A_log2e[i]));
      const V added = entering * B_or_C[step * d_state + i];
      h[i] = kBackward ? V(a * (h[i] + added)) : V(a * h[i] + added);
    }
  }
  for (int i = 0; i < Count; ++i) {
    store_vector(tiles.h + (n + i) * tiles.channels + column * lanes, h[i]);
  }
}

template <bool kBackward, bool InRange, class T>
void advance_column(Carry<T>& tiles, int64_t column) {
  int64_t n = 0;
  for (; n + kStatesAtOnce <= tiles.p.d_state; n += kStatesAtOnce) {
    advance_states<kBackward, kStatesAtOnce, InRange>(tiles, n, column);
  }
  for (; n < tiles.p.d_state; ++n) advance_states<kBackward, 1, InRange>(tiles, n, column);
}

template <bool kBackward, class T>
void carry_segment(Carry<T>& tiles, const Segment& segment, const Segment* next) {
  tiles.steps = segment.end - segment.begin;
  tiles.load_input(tiles.p.B, segment, tiles.B);
  for (int64_t first = 0; first < tiles.range.columns; first += tiles.strip_columns) {
    tiles.load_input(tiles.p.u, segment, first, CarryTiles::kInput);
    tiles.load_input(tiles.p.delta, segment, first, CarryTiles::kDt);
    if (tiles.gated()) tiles.load_input(tiles.p.z, segment, first, CarryTiles::kZ);
    for (int64_t c = first; c < tiles.strip_end(first); ++c) {
      tiles.prefetch_next(segment, next, first, c - first, tiles.strip_columns);
      prepare_column<kBackward>(tiles, c);
      tiles.exponents_in_range(c) ? advance_column<kBackward, true>(tiles, c)
                                  : advance_column<kBackward, false>(tiles, c);
    }
  }
}

template <bool kBackward, class T>
void carry_range(Carry<T> tiles, RowSegments segments) {
  using A = Accumulator<T>;
  const SelectiveScanCarry& p = tiles.p;
  for (int64_t i = 0; i < segments.count; ++i) {
    const Segment* segment = segments.data + (kBackward ? segments.count - 1 - i : i);
    const Segment* next = i + 1 == segments.count ? nullptr : segment + (kBackward ? -1 : 1);
    if (kBackward ? segment->ends() : segment->starts()) {
      for (int64_t at = 0; at < p.d_state * tiles.channels; ++at) tiles.h[at] = 0;
      for (int64_t at = 0; at < tiles.channels; ++at) tiles.dt_sum[at] = 0;
    }
    if (segment->begin < segment->end) carry_segment<kBackward>(tiles, *segment, next);
    if (kBackward ? segment->starts() : segment->ends()) {
      const int64_t row = tiles.state_row(*segment);
      tiles.store_by_state(tiles.h, row, p.state);
      memcpy(static_cast<A*>(p.dt_sum) + row, tiles.dt_sum, tiles.range.channels * sizeof(A));
    }
  }
}

template <bool kBackward>
void carry(const SelectiveScanCarry& p, RowSegments segments, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    Scratch<Accumulator<T>> scratch(Carry<T>::scratch_size(p));
    for_each_range(p, begin, end, scratch, [&](const ChannelRange& range) {
      Carry<T> tiles(p, range, scratch);
      tiles.dt_sum = scratch.take(tiles.channels);
      carry_range<kBackward>(tiles, segments);
    });
  });
}

}  // namespace

void selective_scan_carry(const SelectiveScanCarry& p, RowSegments segments, int64_t begin,
                          int64_t end) {
  carry<false>(p, segments, begin, end);
}

void selective_scan_carry_backward(const SelectiveScanCarry& p, RowSegments segments, int64_t begin,
                                   int64_t end) {
  carry<true>(p, segments, begin, end);
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
