// SPDX-License-Identifier: Apache-2.0
//
// Tiles are visited from the last to the first. The states of each are recomputed from the saved
// one, then the gradient of the state goes back through them.
#include "selective_scan/cuda/backward_steps.cuh"

namespace mambablock {
namespace {

// Rows that a thread prepares at once; wide types take many registers, and so do B and C in blocks
// of few threads.
template <class T, int Channels>
inline constexpr int kRowsAtOnce = sizeof(T) == 8                    ? 1
                                   : sizeof(T) == 4 || Channels < 64 ? 2
                                                                     : kRowsPerThread;

template <class A>
struct Prepared {
  A dt, derivative;  // by delta
  A dy, dz;          // dy: of the y before the gate; dz: but for the factor y
};

template <class A>
__device__ __forceinline__ Prepared<A> prepared(A delta, A bias, A dy, A z, bool delta_softplus,
                                                bool gated) {
  const Softplus<A> dt = time_step(delta, bias, delta_softplus);
  if (!gated) return {dt.value, dt.derivative, dy, A(0)};
  const A gate = sigmoid(z);
  return {dt.value, dt.derivative, dy * z * gate, dy * silu_derivative(z, gate)};
}

// Of channels from `column` on, sum_n g B and sum_n A log2(e) a g h_{t-1}.
template <class A, int Channels>
__device__ __forceinline__ void load_sums(const BackwardMemory<A, Channels>& memory, int row,
                                          int column, A (&g_B)[kPack], A (&g_A)[kPack]) {
  A sums[2 * kPack];
  load_vectors(memory.sums[0].at[row][column].values, sums);
  add_vectors(memory.sums[1].at[row][column].values, sums);
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    g_B[j] = sums[2 * j];
    g_A[j] = sums[2 * j + 1];
  }
}

// A channel's sums over the chunk's time.
template <class T, int Channels>
__device__ __forceinline__ void store_channel_sums(
    const Block<T, Channels>& block, const Accumulator<T> (&sums)[kRowThreads][Channels],
    void* partial, int64_t row) {
  Accumulator<T> total = 0;
#pragma unroll
  for (int i = 0; i < kRowThreads; ++i) total += sums[i][block.own];
  if (block.own < block.channels) block.channel_row(partial, row)[block.own] = total;
}

template <class T, int Channels, bool kOneSlice>
__global__ void __launch_bounds__(Channels, 1)
    backward_kernel(const SelectiveScanBackward p, const ScanCudaPlan plan) {
  using A = Accumulator<T>;
  const Block<T, Channels> block(p, plan);
  auto& memory = *reinterpret_cast<BackwardMemory<A, Channels>*>(shared_memory());
  const Sequences& sequences = block.sequences;
  const bool gated = p.z.data != nullptr;
  constexpr int rows_at_once = kRowsAtOnce<T, Channels>;
  constexpr bool unrolled = kOneSlice && sizeof(A) < 8;  // else registers run out
  if (threadIdx.x == 0) memory.row = block.chunk_row();
  __syncthreads();
  const auto carry_row = [&] {
    return plan.carry == nullptr ? nullptr : block.channel_row(plan.carry, memory.row, p.d_state);
  };
  const auto dA_row = [&] { return block.channel_row(p.dA_partial, memory.row, p.d_state); };
  BackwardThread<T, Channels> thread{block, memory, {}, {}, {}, {}};

  // A sequence of no steps hands the gradient of its final state to its initial one.
  const auto pass_through = [&](int64_t s, int64_t first) {
    if (p.dinitial_state == nullptr) return;
    States<A> gradient;
    gradient.load(block, sequence_row(block, p.dfinal_state, s), first);
    gradient.store(block, sequence_row(block, p.dinitial_state, s), first);
  };
  // The sequence that the step before `time` belongs to, and where it begins. Where it ends at
  // `time`, the gradient begins with that of its final state.
  struct Cursor {
    int64_t sequence, begin;
  } cursor{};
  const auto enter = [&](int64_t time, int64_t first) {
    const int64_t boundary = sequences.first_from(time), s = boundary - 1;
    if (sequences.begin(boundary) == time) {
      thread.a_g.load(block, sequence_row(block, p.dfinal_state, s), first);
    }
    return Cursor{s, sequences.begin(s)};
  };
  each_slice<kOneSlice, A>(p.d_state, [&](int64_t first) {
    if (block.end == p.length) {
      for (int64_t s = sequences.first_from(p.length); s < p.sequences; ++s) pass_through(s, first);
    }
    load_A_log2e(block, first, thread.A_log2e);
    thread.a_g.load(block, carry_row(), first);
    thread.dA.load(block, nullptr, first);
    if (block.begin < block.end) cursor = enter(block.end, first);
    if (!kOneSlice) {
      thread.a_g.store(block, carry_row(), first);
      thread.dA.store(block, dA_row(), first);
    }
  });
  memory.delta_bias[block.own] = block.parameter(p.delta_bias, block.own);
  memory.D[block.own] = block.parameter(p.D, block.own);
#pragma unroll
  for (int i = 0; i < kRowThreads; ++i) {
    memory.dD[i][block.own] = memory.ddelta_bias[i][block.own] = 0;
  }
  // Steps past the end of the last tile add nothing.
  for (int step = 0; step < kCudaTile; ++step) {
    for (auto& half : memory.sums) half.at[step][block.own] = {};
  }
  __syncthreads();
  const auto store_sums = [&] {
    if (kOneSlice) thread.dA.store(block, dA_row(), 0);
    store_channel_sums(block, memory.dD, p.dD_partial, memory.row);
    store_channel_sums(block, memory.ddelta_bias, p.ddelta_bias_partial, memory.row);
  };
  if (block.begin == block.end) return store_sums();

  const int64_t tiles = (block.end - block.begin + kCudaTile - 1) / kCudaTile;
  const int64_t last = block.begin + (tiles - 1) * kCudaTile;
  StatesInput<T, Channels> B_input(block, p.B, last), C_input(block, p.C, last);
  TileInput<T> u_input(block, p.u, last), delta_input(block, p.delta, last),
      dy_input(block, p.dy, last), z_input(block, p.z, last);
  TileOutput<T> du_output(block, p.du, last), ddelta_output(block, p.ddelta, last),
      dz_output(block, p.dz, last);
  GradientSums<T, Channels> gradient_sums(block, p, last);
  const A* saved = States<A>::saved_place(block, p.saved_states, last);
  const int64_t saved_of_tile = not_hoisted(p.d_state * p.channels);
  Pack<T> u[rows_at_once] = {}, delta[rows_at_once] = {}, dy[rows_at_once] = {},
          z[rows_at_once] = {}, B[StatesInput<T, Channels>::rounds] = {},
          C[StatesInput<T, Channels>::rounds] = {};
  const bool packs = u_input.in_packs() && delta_input.in_packs() && dy_input.in_packs() &&
                     (!gated || z_input.in_packs()),
             output_packs = p.du.packs && p.ddelta.packs && (!gated || p.dz.packs),
             B_C_packs = p.B.packs && p.C.packs;
  const auto load_rows = [&](int steps, int first_row) {
    with_flag(packs && steps == kCudaTile, [&](auto whole) {
      u_input.template load<whole.value>(steps, first_row, u);
      delta_input.template load<whole.value>(steps, first_row, delta);
      dy_input.template load<whole.value>(steps, first_row, dy);
    });
  };
  const auto load_B_and_C = [&](int steps, int64_t first) {
    with_flag(B_C_packs && steps == kCudaTile, [&](auto whole) {
      B_input.template load<whole.value>(steps, first, B);
      C_input.template load<whole.value>(steps, first, C);
    });
  };
  // Where registers allow it, a tile's rows are loaded before the sums of the one after it.
  constexpr bool ahead = kOneSlice && rows_at_once == kRowsPerThread;
  // Whether a tile lies within one sequence, which begins before it.
  const auto is_inside = [&](int64_t begin, int steps) {
    return steps == kCudaTile && cursor.begin < begin;
  };
  const auto move_inputs = [&] {
    u_input.move(-kCudaTile);
    delta_input.move(-kCudaTile);
    dy_input.move(-kCudaTile);
    z_input.move(-kCudaTile);
    B_input.move(-kCudaTile);
    C_input.move(-kCudaTile);
  };
  int steps = steps_from(last, block.end);
  if (ahead) load_rows(steps, 0);
  for (int64_t begin = last; begin >= block.begin; begin -= kCudaTile) {
    A bias[kPack], dD[kPack];
    load_vectors(&memory.delta_bias[block.column], bias);
    load_vectors(&memory.dD[block.row_thread][block.column], dD);
#pragma unroll 1
    for (int first_row = kRowsPerThread - rows_at_once; first_row >= 0; first_row -= rows_at_once) {
      if (!ahead) load_rows(steps, first_row);
      if (gated) {
        with_flag(packs && steps == kCudaTile,
                  [&](auto whole) { z_input.template load<whole.value>(steps, first_row, z); });
      }
      with_flag(p.delta_softplus, [&](auto delta_softplus) {
        with_flag(gated, [&](auto gated) {
#pragma unroll
          for (int k = 0; k < rows_at_once; ++k) {
            const int row = block.row_of(first_row + k);
            A u_values[kPack], dt[kPack], dtu[kPack], dy_values[kPack], gate[kPack],
                derivative[kPack];
            widen(u[k], u_values);
            widen(delta[k], dt);
            widen(dy[k], dy_values);
            widen(z[k], gate);
#pragma unroll
            for (int j = 0; j < kPack; ++j) {
              const Prepared<A> at = prepared(dt[j], bias[j], dy_values[j], gate[j],
                                              delta_softplus.value, gated.value);
              derivative[j] = at.derivative;
              gate[j] = at.dz;
              dt[j] = at.dt;
              dtu[j] = at.dt * u_values[j];
              dy_values[j] = at.dy;
              dD[j] += at.dy * u_values[j];
            }
            store_vectors(dy_values, &memory.dy[row + 1][block.column]);
            if constexpr (delta_softplus.value) {
              store_vectors(derivative, &memory.derivative[row][block.column]);
            }
            if constexpr (gated.value) store_vectors(gate, &memory.dz[row][block.column]);
            store_pairs(dt, dtu, &memory.dt_and_dtu[row][block.column]);
          }
        });
      });
    }
    store_vectors(dD, &memory.dD[block.row_thread][block.column]);
    const bool inside = is_inside(begin, steps);
    const Cursor at_end = cursor;
    each_slice<kOneSlice, A>(p.d_state, [&](int64_t first) {
      if (!kOneSlice) {
        if (first > 0) __syncthreads();  // all are done with the states before
        load_A_log2e(block, first, thread.A_log2e);
        thread.a_g.load(block, carry_row(), first);
        thread.dA.load(block, dA_row(), first);
        cursor = at_end;
      }
      load_B_and_C(steps, first);
      if (inside) thread.h.load_saved(block, saved, first);
      B_input.put(B, &memory.B[0][0]);
      C_input.put(C, &memory.C[0][0]);
      __syncthreads();
      with_flag(first > 0, [&](auto add) {
        constexpr bool adds = decltype(add)::value;
        if (inside) {
          with_flag(gated, [&](auto gated) {
            recompute_steps<unrolled ? kCudaTile : 1, decltype(gated)::value, adds>(thread, 0,
                                                                                    kCudaTile);
          });
          reverse_steps<unrolled ? 4 : 1, adds>(thread, 0, kCudaTile);
          return;
        }
        for (int64_t time = begin + steps; time > begin;) {
          const int64_t s = cursor.sequence, stop = max(cursor.begin, begin);
          if (cursor.begin >= begin) {
            thread.h.load(block, sequence_row(block, p.initial_state, s), first);
          } else {
            thread.h.load_saved(block, saved, first);
          }
          const int low = int(stop - begin), high = int(time - begin);
          with_flag(gated, [&](auto gated) {
            recompute_steps<unrolled ? 4 : 1, decltype(gated)::value, adds>(thread, low, high);
          });
          reverse_steps<1, adds>(thread, low, high);
          time = stop;
          if (time > cursor.begin) break;
          if (p.dinitial_state != nullptr) {
            thread.a_g.store(block, sequence_row(block, p.dinitial_state, s), first);
          }
          for (int64_t empty = s - 1; empty >= 0 && sequences.begin(empty) == time; --empty) {
            pass_through(empty, first);
          }
          // What ends where the chunk begins is the chunk before's.
          if (time > block.begin) cursor = enter(time, first);
        }
      });
      if (!kOneSlice) {
        thread.a_g.store(block, carry_row(), first);
        thread.dA.store(block, dA_row(), first);
        __syncthreads();
        gradient_sums.store(memory, steps, first);
      }
    });
    // In flight while sums are added up.
    Pack<T> u_again[rows_at_once] = {};
    const auto load_u_again = [&](int first_row) {
      with_flag(packs && steps == kCudaTile,
                [&](auto whole) { u_input.template load<whole.value>(steps, first_row, u_again); });
    };
    if (ahead) {
      load_u_again(0);
      move_inputs();
      if (begin > block.begin) load_rows(kCudaTile, 0);
    }
    if (kOneSlice) {
      __syncthreads();
      gradient_sums.store(memory, steps, 0);
    }
    A D[kPack], ddelta_bias[kPack];
    load_vectors(&memory.D[block.column], D);
    load_vectors(&memory.ddelta_bias[block.row_thread][block.column], ddelta_bias);
#pragma unroll 1
    for (int first_row = kRowsPerThread - rows_at_once; first_row >= 0; first_row -= rows_at_once) {
      Pack<T> du[rows_at_once], ddelta[rows_at_once], dz[rows_at_once];
      if (!ahead) load_u_again(first_row);
      with_flag(p.delta_softplus, [&](auto delta_softplus) {
        with_flag(gated, [&](auto gated) {
#pragma unroll
          for (int k = 0; k < rows_at_once; ++k) {
            constexpr A ln2 = A(0.69314718055994531);
            const int row = block.row_of(first_row + k);
            A u_values[kPack], dt[kPack], dtu[kPack], g_B[kPack], g_A[kPack], dy[kPack], y[kPack],
                dz_values[kPack];
            [[maybe_unused]] A derivative[kPack];
            widen(u_again[k], u_values);
            load_pairs(&memory.dt_and_dtu[row][block.column], dt, dtu);
            load_sums(memory, row, block.column, g_B, g_A);
            load_vectors(&memory.dy[row + 1][block.column], dy);
            if constexpr (delta_softplus.value) {
              load_vectors(&memory.derivative[row][block.column], derivative);
            }
            if constexpr (gated.value) {
              load_vectors(&memory.dz[row][block.column], dz_values);
              load_vectors(&memory.y[row][block.column], y);
            }
#pragma unroll
            for (int j = 0; j < kPack; ++j) {
              const A du_value = g_B[j] * dt[j] + D[j] * dy[j];
              A ddelta_value = g_B[j] * u_values[j] + g_A[j] * ln2;
              if constexpr (delta_softplus.value) ddelta_value *= derivative[j];
              ddelta_bias[j] += ddelta_value;
              if constexpr (gated.value) y[j] = dz_values[j] * (y[j] + D[j] * u_values[j]);
              dt[j] = du_value;
              g_A[j] = ddelta_value;
            }
            du[k] = narrowed<T>(dt);
            ddelta[k] = narrowed<T>(g_A);
            if constexpr (gated.value) dz[k] = narrowed<T>(y);
          }
        });
      });
      with_flag(output_packs && steps == kCudaTile, [&](auto whole) {
        du_output.template store<whole.value>(steps, first_row, du);
        ddelta_output.template store<whole.value>(steps, first_row, ddelta);
        if (gated) dz_output.template store<whole.value>(steps, first_row, dz);
      });
    }
    store_vectors(ddelta_bias, &memory.ddelta_bias[block.row_thread][block.column]);
    if (!ahead) move_inputs();
    du_output.move(-kCudaTile);
    ddelta_output.move(-kCudaTile);
    dz_output.move(-kCudaTile);
    gradient_sums.move(-kCudaTile);
    saved -= saved_of_tile;
    steps = kCudaTile;  // only the last tile may have fewer
    __syncthreads();    // all are done with the tile
  }
  store_sums();
}

template <class F>
void dispatch_block(DType dtype, int channels, F function) {
  dispatch_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      if (channels == 64) return function(type, std::integral_constant<int, 64>());
    }
    function(type, std::integral_constant<int, 32>());
  });
}

}  // namespace

size_t cuda_backward_shared_memory(DType dtype, int channels) {
  size_t bytes = 0;
  dispatch_block(dtype, channels, [&](auto type, auto block) {
    bytes = sizeof(BackwardMemory<Accumulator<decltype(type)>, block.value>);
  });
  return bytes;
}

void cuda_backward(const char* op, const SelectiveScanBackward& p, const ScanCudaPlan& plan,
                   int channels, cudaStream_t stream) {
  dispatch_block(p.dtype, channels, [&](auto type, auto block) {
    using T = decltype(type);
    constexpr int threads = block.value;
    const bool one_slice = p.d_state <= kStatesAtOnce<Accumulator<T>>;
    launch(op, one_slice ? backward_kernel<T, threads, true> : backward_kernel<T, threads, false>,
           cuda_blocks(p, plan, channels), threads, sizeof(BackwardMemory<Accumulator<T>, threads>),
           stream, p, plan);
  });
}

}  // namespace mambablock
