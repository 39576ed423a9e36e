// SPDX-License-Identifier: Apache-2.0
//
// Segments run from the last to the first. Each one's states are computed again from the saved one,
// then the gradient g of the state runs back through them:
//   g_t = C_t dy_t + a_{t+1} g_{t+1}
#include "cpu_tiles.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {
namespace {

// States worked on at a time; more of them no longer fit the first-level cache.
constexpr int kStatesAtOnce = 2;

template <class T>
struct GradientTiles : Tiles<T> {
  using A = Accumulator<T>;
  using V = Vector<A>;
  using Tiles<T>::tile_size, Tiles<T>::channel_slots, Tiles<T>::lanes;
  static constexpr int64_t lane_tile = kTimeTile * lanes;

  static int64_t scratch_size(int64_t d_state) {
    return Tiles<T>::scratch_size(d_state) + 3 * tile_size + (2 * d_state + 2) * channel_slots +
           4 * kStatesAtOnce * lane_tile + lanes;
  }

  GradientTiles(const SelectiveScanParams& p, const WorkItem& item, Scratch<A>& scratch)
      : Tiles<T>(p, item, scratch) {
    dy = scratch.take(tile_size);
    g_B = scratch.take(tile_size);
    g_A = scratch.take(tile_size);
    a_g = scratch.take(p.d_state * channel_slots);
    dA = scratch.take(p.d_state * channel_slots);
    dD = scratch.take(channel_slots);
    ddelta_bias = scratch.take(channel_slots);
    states = scratch.take(kStatesAtOnce * lane_tile + lanes);
    decays = scratch.take(kStatesAtOnce * lane_tile);
    dB = scratch.take(kStatesAtOnce * lane_tile);
    dC = scratch.take(kStatesAtOnce * lane_tile);
    memset(dA, 0, p.d_state * channel_slots * sizeof(A));
    memset(dD, 0, channel_slots * sizeof(A));
    memset(ddelta_bias, 0, channel_slots * sizeof(A));
  }

  // Per step: the gradient of y before the gate, sum_n g B, and sum_n A a g h_{t-1}.
  A *dy, *g_B, *g_A;
  // Per state: a_{t+1} g_{t+1}, and dA. Per channel: dD and ddelta_bias.
  A *a_g, *dA, *dD, *ddelta_bias;
  // Of the states at hand in one column, [step][state]: h (the one before the first step too) and
  // a. Summed over columns: dB and dC before the sum over lanes.
  A *states, *decays, *dB, *dC;
};

// h of `Count` states from n of one column over the segment, with C . h added to y.
template <int Count, class T>
void recompute_states(GradientTiles<T>& tiles, int64_t n, int64_t column) {
  using V = typename GradientTiles<T>::V;
  constexpr int lanes = GradientTiles<T>::lanes;
  const int64_t d_state = tiles.p.d_state, first = column * kTimeTile * lanes;
  const auto *dt = tiles.dt + first, *dt_u = tiles.dt_u + first;
  auto* y = tiles.y + first;
  const auto *B = tiles.B + n, *C = tiles.C + n;
  V A_log2e[Count], h[Count];
  for (int i = 0; i < Count; ++i) {
    const int64_t at = (n + i) * tiles.channel_slots + column * lanes;
    A_log2e[i] = load_vector<V>(tiles.A_log2e + at);
    h[i] = load_vector<V>(tiles.h + at);
  }
  const bool gated = tiles.p.z.data != nullptr;
  for (int64_t step = 0; step < tiles.steps; ++step) {
    const V dt_step = load_vector<V>(dt + step * lanes);
    const V dt_u_step = load_vector<V>(dt_u + step * lanes);
    V y_step = V{};
    for (int i = 0; i < Count; ++i) {
      const V a = exp2(V(dt_step * A_log2e[i]));
      h[i] = a * h[i] + dt_u_step * B[step * d_state + i];
      y_step += h[i] * C[step * d_state + i];
      store_vector(tiles.decays + (step * Count + i) * lanes, a);
      store_vector(tiles.states + (step * Count + i) * lanes, h[i]);
    }
    if (gated) store_vector(y + step * lanes, V(load_vector<V>(y + step * lanes) + y_step));
  }
}

template <int Count, class T>
void reverse_states(GradientTiles<T>& tiles, int64_t n, int64_t column) {
  using V = typename GradientTiles<T>::V;
  constexpr int lanes = GradientTiles<T>::lanes;
  constexpr auto ln2 = ScalarOf<V>(0.69314718055994531);
  const int64_t d_state = tiles.p.d_state, first = column * kTimeTile * lanes;
  const auto *dt = tiles.dt + first, *dt_u = tiles.dt_u + first, *dy = tiles.dy + first;
  auto *g_B = tiles.g_B + first, *g_A = tiles.g_A + first;
  const auto *B = tiles.B + n, *C = tiles.C + n;
  V A_values[Count], a_g[Count], dA[Count], h[Count], h_first[Count];
  for (int i = 0; i < Count; ++i) {
    const int64_t at = (n + i) * tiles.channel_slots + column * lanes;
    A_values[i] = load_vector<V>(tiles.A_log2e + at) * ln2;
    a_g[i] = load_vector<V>(tiles.a_g + at);
    dA[i] = load_vector<V>(tiles.dA + at);
    h_first[i] = load_vector<V>(tiles.h + at);
    h[i] = load_vector<V>(tiles.states + ((tiles.steps - 1) * Count + i) * lanes);
  }
  for (int64_t step = tiles.steps - 1; step >= 0; --step) {
    const V dt_step = load_vector<V>(dt + step * lanes);
    const V dt_u_step = load_vector<V>(dt_u + step * lanes);
    const V dy_step = load_vector<V>(dy + step * lanes);
    V g_B_step = load_vector<V>(g_B + step * lanes), g_A_step = load_vector<V>(g_A + step * lanes);
    for (int i = 0; i < Count; ++i) {
      const int64_t at = (step * Count + i) * lanes;
      const V previous = step > 0 ? load_vector<V>(tiles.states + at - Count * lanes) : h_first[i];
      const V g = dy_step * C[step * d_state + i] + a_g[i];
      store_vector(tiles.dB + at, V(load_vector<V>(tiles.dB + at) + g * dt_u_step));
      store_vector(tiles.dC + at, V(load_vector<V>(tiles.dC + at) + dy_step * h[i]));
      g_B_step += g * B[step * d_state + i];
      a_g[i] = g * load_vector<V>(tiles.decays + at);
      const V a_g_h = a_g[i] * previous;
      g_A_step += a_g_h * A_values[i];
      dA[i] += a_g_h * dt_step;
      h[i] = previous;
    }
    store_vector(g_B + step * lanes, g_B_step);
    store_vector(g_A + step * lanes, g_A_step);
  }
  for (int i = 0; i < Count; ++i) {
    const int64_t at = (n + i) * tiles.channel_slots + column * lanes;
    store_vector(tiles.a_g + at, a_g[i]);
    store_vector(tiles.dA + at, dA[i]);
  }
}

template <int Count, class T>
void backward_states(GradientTiles<T>& tiles, const Segment& segment, int64_t n) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  const SelectiveScanParams& p = tiles.p;
  const WorkItem& item = tiles.item;
  memset(tiles.dB, 0, tiles.steps * Count * lanes * sizeof(A));
  memset(tiles.dC, 0, tiles.steps * Count * lanes * sizeof(A));
  for (int64_t column = 0; column < item.columns; ++column) {
    recompute_states<Count>(tiles, n, column);
    reverse_states<Count>(tiles, n, column);
  }
  const auto store_sums = [&](const Strided3Out& partial, const A* sums) {
    A* target = static_cast<A*>(partial.data) +
                (item.block * p.batch + item.batch) * partial.batch + item.group * p.d_state + n;
    for (int64_t step = 0; step < tiles.steps; ++step) {
      for (int i = 0; i < Count; ++i) {
        target[(segment.begin + step) * partial.time + i] =
            sum_lanes(load_vector<V>(sums + (step * Count + i) * lanes));
      }
    }
  };
  store_sums(p.dB_partial, tiles.dB);
  store_sums(p.dC_partial, tiles.dC);
}

// Before the states: dy of the ungated y, and y's place cleared for C . h + D u.
template <class T>
void prepare_gradient(GradientTiles<T>& tiles, const Segment& segment) {
  using V = typename GradientTiles<T>::V;
  constexpr int lanes = GradientTiles<T>::lanes;
  const SelectiveScanParams& p = tiles.p;
  const WorkItem& item = tiles.item;
  load_tile<T>(p.dy, item.batch, segment.begin, tiles.steps, item.channel, item.channels, tiles.dy,
               kTimeTile);
  for (int64_t column = 0; column < item.columns; ++column) {
    const int64_t first = column * kTimeTile * lanes;
    memset(tiles.g_B + first, 0, tiles.steps * sizeof(V));
    memset(tiles.g_A + first, 0, tiles.steps * sizeof(V));
    V dD = load_vector<V>(tiles.dD + column * lanes);
    for (int64_t step = 0; step < tiles.steps; ++step) {
      const int64_t at = first + step * lanes;
      V dy = load_vector<V>(tiles.dy + at);
      if (p.z.data != nullptr) {
        const V z = load_vector<V>(tiles.z + at), gate = sigmoid(z);
        // z's tile now carries dz but for the factor y.
        store_vector(tiles.z + at, V(dy * silu_derivative(z, gate)));
        dy *= z * gate;
        store_vector(tiles.dy + at, dy);
      }
      dD += dy * load_vector<V>(tiles.u + at);
    }
    store_vector(tiles.dD + column * lanes, dD);
  }
}

// After the states: du, ddelta and dz of the segment.
template <class T>
void finish_gradient(GradientTiles<T>& tiles, const Segment& segment) {
  using V = typename GradientTiles<T>::V;
  constexpr int lanes = GradientTiles<T>::lanes;
  const SelectiveScanParams& p = tiles.p;
  const WorkItem& item = tiles.item;
  for (int64_t column = 0; column < item.columns; ++column) {
    const V skip = load_vector<V>(tiles.D + column * lanes);
    V ddelta_bias = load_vector<V>(tiles.ddelta_bias + column * lanes);
    for (int64_t step = 0; step < tiles.steps; ++step) {
      const int64_t at = (column * kTimeTile + step) * lanes;
      const V g_B = load_vector<V>(tiles.g_B + at), u = load_vector<V>(tiles.u + at);
      V ddelta = g_B * u + load_vector<V>(tiles.g_A + at);
      if (p.delta_softplus) ddelta *= softplus_derivative(load_vector<V>(tiles.delta + at));
      ddelta_bias += ddelta;
      const V dy = load_vector<V>(tiles.dy + at);
      store_vector(tiles.g_A + at, ddelta);
      store_vector(tiles.u + at, V(g_B * load_vector<V>(tiles.dt + at) + skip * dy));
      if (p.z.data != nullptr) {
        store_vector(tiles.z + at, V(load_vector<V>(tiles.z + at) * load_vector<V>(tiles.y + at)));
      }
    }
    store_vector(tiles.ddelta_bias + column * lanes, ddelta_bias);
  }
  const auto store = [&](const Strided3Out& output, const Accumulator<T>* tile) {
    store_tile<T>(output, item.batch, segment.begin, tiles.steps, item.channel, item.channels, tile,
                  kTimeTile);
  };
  store(p.du, tiles.u);
  store(p.ddelta, tiles.g_A);
  if (p.z.data != nullptr) store(p.dz, tiles.z);
}

template <class T>
void backward_item(const SelectiveScanParams& p, int64_t index, Scratch<Accumulator<T>>& scratch) {
  using A = Accumulator<T>;
  GradientTiles<T> tiles(p, work_item<A>(p, index), scratch);
  const WorkItem& item = tiles.item;
  for (int64_t s = p.segment_count - 1; s >= 0; --s) {
    const Segment& segment = p.segments[s];
    if (segment.ends()) tiles.load_state(p.dfinal_state, segment, tiles.a_g);
    if (segment.begin < segment.end) {
      if (segment.begin % kTimeTile == 0) {
        memset(tiles.h, 0, p.d_state * tiles.channel_slots * sizeof(A));
        const A* saved = tiles.saved_state(segment);
        for (int64_t n = 0; n < p.d_state; ++n) {
          memcpy(tiles.h + n * tiles.channel_slots, saved + n * p.channels,
                 item.channels * sizeof(A));
        }
      } else {
        tiles.load_state(p.initial_state, segment, tiles.h);
      }
      tiles.load(segment);
      prepare_gradient(tiles, segment);
      int64_t n = 0;
      for (; n + kStatesAtOnce <= p.d_state; n += kStatesAtOnce) {
        backward_states<kStatesAtOnce>(tiles, segment, n);
      }
      for (; n < p.d_state; ++n) backward_states<1>(tiles, segment, n);
      finish_gradient(tiles, segment);
    }
    if (segment.starts() && p.dinitial_state != nullptr) {
      tiles.store_state(p.dinitial_state, segment, tiles.a_g);
    }
  }
  const int64_t row = item.batch * p.channels + item.channel;
  for (int64_t c = 0; c < item.channels; ++c) {
    for (int64_t n = 0; n < p.d_state; ++n) {
      static_cast<A*>(p.dA_partial)[(row + c) * p.d_state + n] =
          tiles.dA[n * tiles.channel_slots + c];
    }
    static_cast<A*>(p.dD_partial)[row + c] = tiles.dD[c];
    static_cast<A*>(p.ddelta_bias_partial)[row + c] = tiles.ddelta_bias[c];
  }
}

}  // namespace

void selective_scan_backward(const SelectiveScanParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t size = GradientTiles<T>::scratch_size(p.d_state);
    for (int64_t index = begin; index < end; ++index) {
      Scratch<Accumulator<T>> scratch(size);
      backward_item<T>(p, index, scratch);
    }
  });
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
