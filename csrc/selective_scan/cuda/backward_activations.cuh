// SPDX-License-Identifier: Apache-2.0
//
// What the backward does with the activations of a tile: into shared memory, and their gradients
// out of the sums over the states.
#pragma once

#include "selective_scan/cuda/backward_steps.cuh"

namespace mambablock {

// Of a thread's rows and columns, from the last tile to the first. kRegular: the block is full, and
// all are in packs.
template <class T, bool kRegular>
class BackwardActivations {
  using A = Accumulator<T>;
  using Block = BackwardBlock<T>;
  using Memory = BackwardMemory<T>;
  using Saved = SavedStates<T, Block, const void>;
  static constexpr int tile = kCudaSavedSteps;
  static_assert(Block::rows == 1);

 public:
  // From the tile at `last` on.
  __device__ BackwardActivations(const SelectiveScanBackward& p, const Block& block, Memory& memory,
                                 int64_t last)
      : p(p),
        block(block),
        memory(memory),
        u_input(block, p.u, last),
        delta_input(block, p.delta, last),
        dy_input(block, p.dy, last),
        z_input(block, p.z, last),
        B_input(block, p.B, last),
        C_input(block, p.C, last),
        du_output(block, p.du, last),
        ddelta_output(block, p.ddelta, last),
        dz_output(block, p.dz, last),
        saved(block, p.saved_states, last),
        gated(p.z.data != nullptr) {
    const int channel = threadIdx.x;
    if (channel < Block::channels_at_once) {
      memory.delta_bias[channel] = block.parameter(p.delta_bias, channel);
      memory.D[channel] = block.parameter(p.D, channel);
    }
  }

  // The next tile's, into registers.
  __device__ __forceinline__ void load(int steps) {
    u_input.template load<kRegular>(steps, next_u);
    delta_input.template load<kRegular>(steps, delta);
    dy_input.template load<kRegular>(steps, dy);
    u_input.move(-tile);
    delta_input.move(-tile);
    dy_input.move(-tile);
    if (!gated) return;
    z_input.template load<kRegular>(steps, z);
    z_input.move(-tile);
  }

  // The next tile's B, C and state on entering it, of states from `first` on.
  __device__ __forceinline__ void load_states(int steps, int64_t first) {
    B_input.template load<kRegular>(steps, first, B);
    C_input.template load<kRegular>(steps, first, C);
    if constexpr (kRegular) {
      saved.load(entering);
    } else {
      saved.load(first, entering);
    }
  }
  __device__ __forceinline__ void next_states() {
    B_input.move(-tile);
    C_input.move(-tile);
    saved.move(-1);
  }
  __device__ __forceinline__ void put_B_and_C() {
    B_input.put(B, &memory.B[0][0]);
    C_input.put(C, &memory.C[0][0]);
  }
  __device__ __forceinline__ States<A> entering_state() const {
    States<A> h;
    Saved::widen(entering, h);
    return h;
  }

  // What was loaded, into shared memory; dt is 0 for steps past the end.
  __device__ __forceinline__ void put(int steps) {
    with_flag(p.delta_softplus, [&](auto delta_softplus) {
      with_flag(gated, [&](auto gated) {
        A u_values[kPack], dt[kPack], dtu[kPack], dy_values[kPack], z_values[kPack], bias[kPack];
        u[0] = next_u[0];
        widen(u[0], u_values);
        widen(delta[0], dt);
        widen(dy[0], dy_values);
        if constexpr (gated.value) widen(z[0], z_values);
        load_vectors(&memory.delta_bias[block.column], bias);
        const bool exists = block.row < steps;
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          const Softplus<A> at = time_step(dt[j], bias[j], delta_softplus.value);
          derivative[j] = at.derivative;
          dt[j] = exists ? at.value : A(0);
          dtu[j] = dt[j] * u_values[j];
          if constexpr (gated.value) {
            const A gate = sigmoid(z_values[j]);
            dz_by_y[j] = dy_values[j] * silu_derivative(z_values[j], gate);
            dy_values[j] *= z_values[j] * gate;
          }
          dD[j] += dy_values[j] * u_values[j];
        }
        store_vectors(dy_values, &memory.dy[block.row][block.column]);
        memory.dt_and_dtu.store(block.row, block.column, dt, dtu);
      });
    });
  }

  // The gradients of the activations, from the sums over the states.
  __device__ __forceinline__ void finish(int steps) {
    Pack<T> du[1] = {}, ddelta[1] = {}, dz[1] = {};
    if (block.row < steps) {
      constexpr A ln2 = A(0.69314718055994531);
      A u_values[kPack], dt[kPack], dtu[kPack], g_B[kPack], g_A[kPack], dy[kPack], D[kPack];
      widen(u[0], u_values);
      memory.dt_and_dtu.load(block.row, block.column, dt, dtu);
      load_vectors(&memory.dy[block.row][block.column], dy);
      load_vectors(&memory.D[block.column], D);
      load_sums(g_B, g_A);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        dt[j] = g_B[j] * dt[j] + D[j] * dy[j];
        g_A[j] = g_B[j] * u_values[j] + g_A[j] * ln2;
        if (p.delta_softplus) g_A[j] *= derivative[j];
        ddelta_bias[j] += g_A[j];
      }
      du[0] = narrowed<T>(dt);
      ddelta[0] = narrowed<T>(g_A);
      if (gated) dz[0] = finish_dz(u_values, D);
    }
    du_output.template store<kRegular>(steps, du);
    ddelta_output.template store<kRegular>(steps, ddelta);
    if (gated) dz_output.template store<kRegular>(steps, dz);
    du_output.move(-tile);
    ddelta_output.move(-tile);
    dz_output.move(-tile);
  }

  // The channels' sums over the chunk's time, by way of the memory of the tiles.
  __device__ __forceinline__ void store_channel_sums() {
    A(&dD_rows)[tile][Block::channels_at_once] = memory.dy;
    A(&ddelta_bias_rows)[tile][Block::channels_at_once] = memory.y.parts[0].at;
    store_vectors(dD, &dD_rows[block.row][block.column]);
    store_vectors(ddelta_bias, &ddelta_bias_rows[block.row][block.column]);
    __syncthreads();
    const int channel = threadIdx.x;
    if (channel >= block.channels) return;
    A dD_sum = 0, ddelta_bias_sum = 0;
#pragma unroll
    for (int i = 0; i < tile; ++i) {
      dD_sum += dD_rows[i][channel];
      ddelta_bias_sum += ddelta_bias_rows[i][channel];
    }
    block.channel_row(p.dD_partial, block.chunk_row())[channel] = dD_sum;
    block.channel_row(p.ddelta_bias_partial, block.chunk_row())[channel] = ddelta_bias_sum;
  }

 private:
  // sum_n g B and sum_n A log2(e) a g h_{t-1}.
  __device__ __forceinline__ void load_sums(A (&g_B)[kPack], A (&g_A)[kPack]) const {
    memory.sums.parts[0].tile.load(block.row, block.column, g_B, g_A);
#pragma unroll
    for (int i = 1; i < kParts; ++i) {
      A more_B[kPack], more_A[kPack];
      memory.sums.parts[i].tile.load(block.row, block.column, more_B, more_A);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        g_B[j] += more_B[j];
        g_A[j] += more_A[j];
      }
    }
  }

  __device__ __forceinline__ Pack<T> finish_dz(const A (&u_values)[kPack],
                                               const A (&D)[kPack]) const {
    A y[kPack];
    load_vectors(&memory.y.parts[0].at[block.row][block.column], y);
#pragma unroll
    for (int i = 1; i < kParts; ++i) {
      add_vectors(&memory.y.parts[i].at[block.row][block.column], y);
    }
#pragma unroll
    for (int j = 0; j < kPack; ++j) y[j] = dz_by_y[j] * (y[j] + D[j] * u_values[j]);
    return narrowed<T>(y);
  }

  const SelectiveScanBackward& p;
  const Block& block;
  Memory& memory;
  TileInput<T, Block> u_input, delta_input, dy_input, z_input;
  StatesInput<T, Block> B_input, C_input;
  TileOutput<T, Block> du_output, ddelta_output, dz_output;
  Saved saved;
  const bool gated;
  A derivative[kPack] = {}, dz_by_y[kPack] = {};  // of dt by delta; of z by y
  A dD[kPack] = {}, ddelta_bias[kPack] = {};
  Pack<T> u[1] = {}, next_u[1] = {}, delta[1] = {}, dy[1] = {}, z[1] = {},
          B[StatesInput<T, Block>::rounds] = {}, C[StatesInput<T, Block>::rounds] = {};
  typename Saved::Pair entering[Saved::count] = {};
};

}  // namespace mambablock
