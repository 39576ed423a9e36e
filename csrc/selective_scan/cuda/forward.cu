// SPDX-License-Identifier: Apache-2.0
#include "selective_scan/cuda/states.cuh"

namespace mambablock {
namespace {

constexpr int kChannels = kCudaForwardChannels;

// A block's shared memory: [step][channel] or [step][state].
template <class A>
struct Memory {
  alignas(16) AlignedVector<A, 2> dt_and_dtu[kCudaTile][kChannels];  // dt, dt * u
  HalfSums<A, kChannels> y[2];                                       // C . h
  alignas(16) A B[kCudaTile][kStatesAtOnce<A>], C[kCudaTile][kStatesAtOnce<A>];
};

// One step of the tile. The sums over the states go to y, added to what is there.
template <bool kAdd, class T>
__device__ __forceinline__ void advance(const Block<T, kChannels>& block,
                                        Memory<Accumulator<T>>& memory, int step,
                                        const States<Accumulator<T>>& A_log2e,
                                        States<Accumulator<T>>& h) {
  using A = Accumulator<T>;
  constexpr int held = kStatesHeld<A>;
  A B[held], C[held], at[4];  // dt and dt * u of both channels
  load_vectors(memory.B[step] + block.half * held, B);
  load_vectors(memory.C[step] + block.half * held, C);
  load_vectors(memory.dt_and_dtu[step][block.pair].values, at);
  auto& y = *reinterpret_cast<AlignedVector<A, 2>*>(&memory.y[block.half].at[step][block.pair]);
  AlignedVector<A, 2> sums{};
  if constexpr (kAdd) sums = y;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const A dt = at[2 * k], dtu = at[2 * k + 1];
#pragma unroll
    for (int i = 0; i < held; ++i) {
      A& state = h.values[k][i];
      state = exp2(dt * A_log2e.values[k][i]) * state + dtu * B[i];
      sums.values[k] += state * C[i];
    }
  }
  y = sums;
}

template <class T, bool kOneSlice>
__global__ void __launch_bounds__(kChannels, 1)
    forward_kernel(const SelectiveScanForward p, const ScanCudaPlan plan) {
  using A = Accumulator<T>;
  const Block<T, kChannels> block(p, plan);
  auto& memory = *reinterpret_cast<Memory<A>*>(shared_memory());
  A* carry =
      plan.carry == nullptr ? nullptr : block.channel_row(plan.carry, block.chunk_row(), p.d_state);
  States<A> A_log2e, h;
  SequenceCursor cursor{};
  const auto start = [&](int64_t s, int64_t time, int64_t first) {
    return start_sequences(
        block.sequences, s, time,
        [&](int64_t s) { h.load(block, sequence_row(block, p.initial_state, s), first); },
        [&](int64_t s) { h.store(block, sequence_row(block, p.final_state, s), first); });
  };
  each_slice<kOneSlice, A>(p.d_state, [&](int64_t first) {
    load_A_log2e(block, first, A_log2e);
    const int64_t boundary = block.sequences.first_from(block.begin);
    if (boundary < p.sequences && block.sequences.begin(boundary) == block.begin) {
      cursor = start(boundary, block.begin, first);
    } else {
      cursor = {boundary - 1, block.sequences.begin(boundary)};
      h.load(block, carry, first);
    }
    if (!kOneSlice) h.store(block, carry, first);
  });

  if (block.begin == block.end) return;
  StatesInput<T, kChannels> B_input(block, p.B, block.begin), C_input(block, p.C, block.begin);
  TileInput<T> u_input(block, p.u, block.begin), delta_input(block, p.delta, block.begin),
      z_input(block, p.z, block.begin);
  TileOutput<T> y_output(block, p.y, block.begin);
  A* saved = States<A>::saved_place(block, p.saved_states, block.begin);
  const int64_t saved_of_tile = not_hoisted(p.d_state * p.channels);
  const bool gated = p.z.data != nullptr;
  Pack<T> u[kRowsPerThread] = {}, delta[kRowsPerThread] = {}, z[kRowsPerThread] = {},
          B[StatesInput<T, kChannels>::rounds] = {}, C[StatesInput<T, kChannels>::rounds] = {};
  const bool packs = u_input.in_packs() && delta_input.in_packs() && (!gated || z_input.in_packs()),
             B_C_packs = p.B.packs && p.C.packs;
  const auto load_B_and_C = [&](int steps, int64_t first) {
    with_flag(B_C_packs && steps == kCudaTile, [&](auto whole) {
      B_input.template load<whole.value>(steps, first, B);
      C_input.template load<whole.value>(steps, first, C);
    });
  };
  // Of the next tile.
  const auto load_inputs = [&](int steps) {
    with_flag(packs && steps == kCudaTile, [&](auto whole) {
      u_input.template load<whole.value>(steps, 0, u);
      delta_input.template load<whole.value>(steps, 0, delta);
    });
    u_input.move(kCudaTile);
    delta_input.move(kCudaTile);
    if (kOneSlice) {
      load_B_and_C(steps, 0);
      B_input.move(kCudaTile);
      C_input.move(kCudaTile);
    }
  };
  A bias[kPack], skip[kPack];
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    bias[j] = block.parameter(p.delta_bias, block.column + j);
    skip[j] = block.parameter(p.D, block.column + j);
  }
  // float64 would take too many registers to load a tile while the one before is processed.
  constexpr bool ahead = sizeof(A) < 8;
  int next_steps = steps_from(block.begin, block.end);
  if (ahead) load_inputs(next_steps);
  for (int64_t begin = block.begin; begin < block.end; begin += kCudaTile) {
    const int steps = next_steps;
    next_steps = steps_from(begin + kCudaTile, block.end);
    if (!ahead) load_inputs(steps);
    A from_u[kRowsPerThread][kPack];  // D * u
    with_flag(p.delta_softplus, [&](auto delta_softplus) {
#pragma unroll
      for (int k = 0; k < kRowsPerThread; ++k) {
        A u_values[kPack], dt[kPack], dtu[kPack];
        widen(u[k], u_values);
        widen(delta[k], dt);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          dt[j] = time_step(dt[j], bias[j], delta_softplus.value).value;
          dtu[j] = dt[j] * u_values[j];
          from_u[k][j] = skip[j] * u_values[j];
        }
        store_pairs(dt, dtu, &memory.dt_and_dtu[block.row_of(k)][block.column]);
      }
    });
    if (kOneSlice) {
      B_input.put(B, &memory.B[0][0]);
      C_input.put(C, &memory.C[0][0]);
    }
    // In flight while the states advance.
    if (ahead && next_steps > 0) load_inputs(next_steps);
    if (gated) {
      with_flag(packs && steps == kCudaTile,
                [&](auto whole) { z_input.template load<whole.value>(steps, 0, z); });
      z_input.move(kCudaTile);
    }

    const SequenceCursor at_begin = cursor;
    each_slice<kOneSlice, A>(p.d_state, [&](int64_t first) {
      if (!kOneSlice) {
        if (first > 0) __syncthreads();  // all are done with the states before
        load_B_and_C(steps, first);
        B_input.put(B, &memory.B[0][0]);
        C_input.put(C, &memory.C[0][0]);
        load_A_log2e(block, first, A_log2e);
        h.load(block, carry, first);
        cursor = at_begin;
      }
      __syncthreads();
      if (p.saved_states != nullptr) h.save(block, saved, first);
      with_flag(first > 0, [&](auto add) {
        const auto advance_to = [&](int step) {
          advance<add.value>(block, memory, step, A_log2e, h);
        };
        // Most tiles lie within one sequence.
        if (steps == kCudaTile && cursor.end > begin + kCudaTile) {
          each_step<kUnrolled<A>>(advance_to);
          return;
        }
        for (int step = 0; step < steps;) {
          const int64_t rest = cursor.end - begin;
          const int stop = rest < steps ? int(rest) : steps;
#pragma unroll 1
          for (; step < stop; ++step) advance_to(step);
          const int64_t time = begin + step;
          if (time != cursor.end) break;
          h.store(block, sequence_row(block, p.final_state, cursor.sequence), first);
          // What begins where the chunk ends is the next chunk's, if there is one.
          if (time < block.end || time == p.length) {
            cursor = start(cursor.sequence + 1, time, first);
          }
        }
      });
      if (!kOneSlice) h.store(block, carry, first);
    });
    __syncthreads();

    Pack<T> y[kRowsPerThread];
    with_flag(gated, [&](auto gated) {
#pragma unroll
      for (int k = 0; k < kRowsPerThread; ++k) {
        A values[kPack], gate[kPack];
        load_vectors(&memory.y[0].at[block.row_of(k)][block.column], values);
        add_vectors(&memory.y[1].at[block.row_of(k)][block.column], values);
        if constexpr (gated.value) widen(z[k], gate);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          values[j] += from_u[k][j];
          if constexpr (gated.value) values[j] *= silu(gate[j]);
        }
        y[k] = narrowed<T>(values);
      }
    });
    with_flag(p.y.packs && steps == kCudaTile,
              [&](auto whole) { y_output.template store<whole.value>(steps, 0, y); });
    y_output.move(kCudaTile);
    if (!kOneSlice) {
      B_input.move(kCudaTile);
      C_input.move(kCudaTile);
    }
    saved += saved_of_tile;
  }
}

}  // namespace

void cuda_forward(const char* op, const SelectiveScanForward& p, const ScanCudaPlan& plan,
                  cudaStream_t stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const bool one_slice = p.d_state <= kStatesAtOnce<Accumulator<T>>;
    launch(op, one_slice ? forward_kernel<T, true> : forward_kernel<T, false>,
           cuda_blocks(p, plan, kChannels), kChannels, sizeof(Memory<Accumulator<T>>), stream, p,
           plan);
  });
}

}  // namespace mambablock
