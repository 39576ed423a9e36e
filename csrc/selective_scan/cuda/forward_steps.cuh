// SPDX-License-Identifier: Apache-2.0
//
// What the forward does with a tile: its inputs into shared memory, the states through its steps,
// and its outputs out of the sums over the states.
#pragma once

#include "selective_scan/cuda/states.cuh"

namespace mambablock {

template <class T>
using ForwardBlock = Block<T, kCudaForwardChannels, kCudaTile>;

// A tile in shared memory: [step][channel] or [step][state].
template <class T>
struct ForwardTile {
  using A = Accumulator<T>;
  PairTile<A, ForwardBlock<T>> dt_and_dtu;  // dt, dt * u
  PartSums<A, ForwardBlock<T>> y;           // C . h
  alignas(16) A B[kCudaTile][kStatesAtOnce<A>], C[kCudaTile][kStatesAtOnce<A>];
};

// The states of a thread's channels, and their way through a tile.
template <class T>
class ForwardStates {
  using A = Accumulator<T>;
  using Block = ForwardBlock<T>;
  using Tile = ForwardTile<T>;
  static constexpr int held = kStatesHeld<A>;

  // Of a step: dt and dt * u of both channels; B and C; the decays of the states.
  struct TimeSteps {
    A values[4];
  };
  struct StateInputs {
    A B[held], C[held];
  };
  struct Decays {
    A values[2][held];
  };

 public:
  __device__ ForwardStates(const SelectiveScanForward& p, const Block& block)
      : block(block),
        pair_place(PairTile<A, Block>::place(block.pair)),
        saves(p.saved_states != nullptr),
        saved(block, p.saved_states, block.begin) {}

  __device__ __forceinline__ void load(int64_t first, const A* row) { h.load(block, row, first); }
  __device__ __forceinline__ void store(int64_t first, A* row) { h.store(block, row, first); }

  // All steps of a tile. Two steps ahead of its use dt is read, and one step ahead its exponentials
  // are computed and B and C read: before the sums of a step are stored, which the compiler could
  // not know to be elsewhere. Steps past the end change nothing.
  template <bool kRegular, bool kAdd>
  __device__ __forceinline__ void advance_whole(Tile& tile, int64_t first) {
    [[maybe_unused]] constexpr int unrolled = kRegular && sizeof(A) == 4 ? kCudaTile : 1;
    TimeSteps now = time_steps(tile, 0), next = time_steps(tile, 1);
    StateInputs inputs = state_inputs(tile, 0);
    Decays decays = decays_of(now);
#pragma unroll unrolled
    for (int step = 0; step < kCudaTile; ++step) {
      if (step % kCudaSavedSteps == 0) save<kRegular>(step, first);
      const TimeSteps after_next = time_steps(tile, (step + 2) % kCudaTile);
      const StateInputs next_inputs = state_inputs(tile, (step + 1) % kCudaTile);
      const Decays next_decays = decays_of(next);
      advance<kAdd>(tile, step, now, inputs, decays);
      now = next;
      next = after_next;
      inputs = next_inputs;
      decays = next_decays;
    }
  }

  // Steps [low, high).
  template <bool kAdd>
  __device__ __forceinline__ void advance_some(Tile& tile, int low, int high, int64_t first) {
#pragma unroll 1
    for (int step = low; step < high; ++step) {
      if (step % kCudaSavedSteps == 0) save<false>(step, first);
      const TimeSteps now = time_steps(tile, step);
      advance<kAdd>(tile, step, now, state_inputs(tile, step), decays_of(now));
    }
  }

  __device__ __forceinline__ void next_tile() { saved.move(kCudaTile / kCudaSavedSteps); }

  States<A> A_log2e;

 private:
  template <bool kRegular>
  __device__ __forceinline__ void save(int step, int64_t first) const {
    if (!saves) return;
    auto target = saved;
    if (step > 0) target.move(1);
    if constexpr (kRegular) {
      if (step == 0 || target.exists()) target.store(h);
    } else {
      target.store(first, h);
    }
  }

  __device__ __forceinline__ TimeSteps time_steps(const Tile& tile, int step) const {
    TimeSteps found;
    tile.dt_and_dtu.load(step, pair_place, found.values);
    return found;
  }

  __device__ __forceinline__ StateInputs state_inputs(const Tile& tile, int step) const {
    StateInputs inputs;
    load_vectors(tile.B[step] + block.part * held, inputs.B);
    load_vectors(tile.C[step] + block.part * held, inputs.C);
    return inputs;
  }

  __device__ __forceinline__ Decays decays_of(const TimeSteps& at) const {
    Decays decays;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < held; ++i) {
        decays.values[k][i] = exp2(at.values[2 * k] * A_log2e.values[k][i]);
      }
    }
    return decays;
  }

  // One step. The sums over the states go to y, added to what is there.
  template <bool kAdd>
  __device__ __forceinline__ void advance(Tile& tile, int step, const TimeSteps& at,
                                          const StateInputs& inputs, const Decays& decays) {
    auto& y =
        *reinterpret_cast<AlignedVector<A, 2>*>(&tile.y.parts[block.part].at[step][block.pair]);
    AlignedVector<A, 2> sums{};
    if constexpr (kAdd) sums = y;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const A dtu = at.values[2 * k + 1];
#pragma unroll
      for (int i = 0; i < held; ++i) {
        A& state = h.values[k][i];
        state = decays.values[k][i] * state + dtu * inputs.B[i];
        sums.values[k] += state * inputs.C[i];
      }
    }
    y = sums;
  }

  const Block& block;
  const int pair_place;
  const bool saves;
  SavedStates<T, Block, void> saved;
  States<A> h;
};

// The activations of a thread's rows and columns, tile after tile: into registers, into shared
// memory, and out of it. kRegular: the block is full, and all are in packs.
template <class T, class Block, bool kRegular>
class ForwardActivations {
  using A = Accumulator<T>;
  using Tile = ForwardTile<T>;
  static constexpr int rows = Block::rows;

 public:
  __device__ ForwardActivations(const SelectiveScanForward& p, const Block& block)
      : p(p),
        block(block),
        u_input(block, p.u, block.begin),
        delta_input(block, p.delta, block.begin),
        z_input(block, p.z, block.begin),
        B_input(block, p.B, block.begin),
        C_input(block, p.C, block.begin),
        y_output(block, p.y, block.begin),
        gated(p.z.data != nullptr) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      bias[j] = block.parameter(p.delta_bias, block.column + j);
      skip[j] = block.parameter(p.D, block.column + j);
    }
  }

  // The next tile's inputs, into registers.
  __device__ __forceinline__ void load(int steps) {
    u_input.template load<kRegular>(steps, next_u);
    delta_input.template load<kRegular>(steps, delta);
    u_input.move(kCudaTile);
    delta_input.move(kCudaTile);
  }

  __device__ __forceinline__ void load_z(int steps) {
    if (!gated) return;
    z_input.template load<kRegular>(steps, z);
    z_input.move(kCudaTile);
  }

  // The next tile's B and C, of states from `first` on.
  __device__ __forceinline__ void load_B_and_C(int steps, int64_t first) {
    B_input.template load<kRegular>(steps, first, B);
    C_input.template load<kRegular>(steps, first, C);
  }
  __device__ __forceinline__ void next_B_and_C() {
    B_input.move(kCudaTile);
    C_input.move(kCudaTile);
  }
  __device__ __forceinline__ void put_B_and_C(Tile& tile) const {
    B_input.put(B, &tile.B[0][0]);
    C_input.put(C, &tile.C[0][0]);
  }

  // What was loaded, into shared memory: dt and dt * u, 0 for steps past the end.
  __device__ __forceinline__ void put(Tile& tile, int steps) {
    with_flag(p.delta_softplus, [&](auto delta_softplus) {
#pragma unroll
      for (int k = 0; k < rows; ++k) {
        A u_values[kPack], dt[kPack], dtu[kPack];
        before_u[k] = u[k];
        u[k] = next_u[k];
        widen(u[k], u_values);
        widen(delta[k], dt);
        const bool exists = block.row_of(k) < steps;
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          dt[j] = time_step(dt[j], bias[j], delta_softplus.value).value;
          if (!exists) dt[j] = 0;
          dtu[j] = dt[j] * u_values[j];
        }
        tile.dt_and_dtu.store(block.row_of(k), block.column, dt, dtu);
      }
    });
  }

  // The tile's y, from the sums over the states; of the tile put last, or of the one before it.
  template <bool kBefore>
  __device__ __forceinline__ void finish(const Tile& tile, int steps) {
    Pack<T> y[rows];
    with_flag(gated, [&](auto gated) {
#pragma unroll
      for (int k = 0; k < rows; ++k) {
        y[k] = {};
        const int row = block.row_of(k);
        if (!kRegular && row >= steps) continue;
        A values[kPack], u_values[kPack], gate[kPack];
        load_vectors(&tile.y.parts[0].at[row][block.column], values);
#pragma unroll
        for (int i = 1; i < kParts; ++i) {
          add_vectors(&tile.y.parts[i].at[row][block.column], values);
        }
        widen(kBefore ? before_u[k] : u[k], u_values);
        if constexpr (gated.value) widen(z[k], gate);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          values[j] += skip[j] * u_values[j];
          if constexpr (gated.value) values[j] *= silu(gate[j]);
        }
        y[k] = narrowed<T>(values);
      }
    });
    y_output.template store<kRegular>(steps, y);
    y_output.move(kCudaTile);
  }

 private:
  const SelectiveScanForward& p;
  const Block& block;
  TileInput<T, Block> u_input, delta_input, z_input;
  StatesInput<T, Block> B_input, C_input;
  TileOutput<T, Block> y_output;
  const bool gated;
  A bias[kPack], skip[kPack];
  Pack<T> before_u[rows] = {}, u[rows] = {}, next_u[rows] = {}, delta[rows] = {}, z[rows] = {},
          B[StatesInput<T, Block>::rounds] = {}, C[StatesInput<T, Block>::rounds] = {};
};

}  // namespace mambablock
