// SPDX-License-Identifier: Apache-2.0
#include "cuda_tiles.cuh"

namespace mambablock {
namespace {

constexpr int kChannels = kCudaForwardChannels;

// A block's shared memory: [step][channel] or [step][state].
template <class A>
struct Memory {
  alignas(16) Pack<A, 2> dt_and_dtu[kCudaTile][kChannels];  // dt, dt * u
  alignas(16) A y[kCudaTile][kChannels];
  alignas(16) A B[kCudaTile][kStatesAtOnce<A>], C[kCudaTile][kStatesAtOnce<A>];
};

// One step of the tile. The sum over the states goes to y, added to what is there.
template <bool kAdd, class T>
__device__ __forceinline__ void advance(const Block<T, kChannels>& block,
                                        Memory<Accumulator<T>>& memory, int step,
                                        const States<Accumulator<T>>& A_log2e,
                                        States<Accumulator<T>>& h) {
  using A = Accumulator<T>;
  constexpr int held = kStatesHeld<A>;
  A B[held], C[held], y[2];
  load_quads(memory.B[step] + block.half * held, B);
  load_quads(memory.C[step] + block.half * held, C);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const Pack<A, 2> at = memory.dt_and_dtu[step][block.channel_of(k)];
    const A dt = at.values[0], dtu = at.values[1];
    y[k] = 0;
#pragma unroll
    for (int i = 0; i < held; ++i) {
      A& state = h.values[k][i];
      state = exp2(dt * A_log2e.values[k][i]) * state + dtu * B[i];
      y[k] += state * C[i];
    }
  }
  const A sum = sum_of_own(y[0], y[1]);
  memory.y[step][block.own] = kAdd ? memory.y[step][block.own] + sum : sum;
}

template <class T>
__global__ void __launch_bounds__(kChannels, 1) forward_kernel(const SelectiveScanParams p) {
  using A = Accumulator<T>;
  const Block<T, kChannels> block(p);
  auto& memory = *reinterpret_cast<Memory<A>*>(shared_memory());
  const bool held_at_once = p.d_state <= kStatesAtOnce<A>;
  A* carry = p.carry == nullptr
                 ? nullptr
                 : block.channel_row(p.carry, block.batch * p.chunks + block.chunk, p.d_state);
  States<A> A_log2e, h;
  SequenceCursor cursor{};
  const auto start = [&](int64_t s, int64_t time, int64_t first) {
    return start_sequences(
        block.sequences, s, time,
        [&](int64_t s) { h.load(block, sequence_row(block, p.initial_state, s), first); },
        [&](int64_t s) { h.store(block, sequence_row(block, p.final_state, s), first); });
  };
  for (int64_t first = 0; first < p.d_state; first += kStatesAtOnce<A>) {
    load_A_log2e(block, first, A_log2e);
    const int64_t boundary = block.sequences.first_from(block.begin);
    if (boundary < p.sequences && block.sequences.begin(boundary) == block.begin) {
      cursor = start(boundary, block.begin, first);
    } else {
      cursor = {boundary - 1, block.sequences.begin(boundary)};
      h.load(block, carry, first);
    }
    if (!held_at_once) h.store(block, carry, first);
  }

  const StatesInput<T, kChannels> B_input(block, p.B), C_input(block, p.C);
  const PackInput<T> u_input = pack_input(block, p.u), delta_input = pack_input(block, p.delta),
                     z_input = pack_input(block, p.z);
  const PackOutput<T> y_output = pack_output(block, p.y);
  const bool gated = p.z.data != nullptr;
  ChannelPack<T> next_u[kRowsPerThread] = {}, next_delta[kRowsPerThread] = {},
                 next_z[kRowsPerThread] = {};
  const auto load_inputs = [&](int64_t begin) {
    const int steps = steps_from(begin, block.end);
    u_input.load_rows(begin, block.row, kRowSpacing, steps, steps == kCudaTile, next_u);
    delta_input.load_rows(begin, block.row, kRowSpacing, steps, steps == kCudaTile, next_delta);
    if (gated) z_input.load_rows(begin, block.row, kRowSpacing, steps, steps == kCudaTile, next_z);
  };
  A bias[kChannelPack], skip[kChannelPack];
#pragma unroll
  for (int j = 0; j < kChannelPack; ++j) {
    bias[j] = block.parameter(p.delta_bias, block.column + j);
    skip[j] = block.parameter(p.D, block.column + j);
  }
  // float64 would take too many registers to load a tile while the one before is worked on.
  constexpr bool ahead = sizeof(A) < 8;
  if (ahead && block.begin < block.end) load_inputs(block.begin);
  for (int64_t begin = block.begin; begin < block.end; begin += kCudaTile) {
    const int steps = steps_from(begin, block.end);
    if (!ahead) load_inputs(begin);
    ChannelPack<T> u[kRowsPerThread], z[kRowsPerThread];
    with_flag(p.delta_softplus, [&](auto delta_softplus) {
#pragma unroll
      for (int k = 0; k < kRowsPerThread; ++k) {
        u[k] = next_u[k];
        z[k] = next_z[k];
        A u_values[kChannelPack], dt[kChannelPack], dtu[kChannelPack];
        widen(u[k], u_values);
        widen(next_delta[k], dt);
#pragma unroll
        for (int j = 0; j < kChannelPack; ++j) {
          dt[j] = time_step(dt[j], bias[j], delta_softplus.value).value;
          dtu[j] = dt[j] * u_values[j];
        }
        store_pairs(dt, dtu, &memory.dt_and_dtu[block.row_of(k)][block.column]);
      }
    });
    // In flight while the states advance.
    if (ahead && begin + kCudaTile < block.end) load_inputs(begin + kCudaTile);

    const SequenceCursor at_begin = cursor;
    for (int64_t first = 0; first < p.d_state; first += kStatesAtOnce<A>) {
      if (first > 0) __syncthreads();  // all are done with the states before
      B_input.load(begin, steps, first, &memory.B[0][0]);
      C_input.load(begin, steps, first, &memory.C[0][0]);
      __syncthreads();
      if (!held_at_once) {
        load_A_log2e(block, first, A_log2e);
        h.load(block, carry, first);
      }
      if (p.saved_states != nullptr) h.save(block, begin / kCudaTile, first);
      cursor = at_begin;
      for (int64_t time = begin; time < begin + steps;) {
        const int64_t stop = cursor.end < begin + steps ? cursor.end : begin + steps;
        with_flag(first > 0, [&](auto add) {
          constexpr bool adds = decltype(add)::value;
          each_step<kUnrolled<A>>(int(time - begin), int(stop - begin), [&](int step) {
            advance<adds>(block, memory, step, A_log2e, h);
          });
        });
        time = stop;
        if (time == cursor.end) {
          h.store(block, sequence_row(block, p.final_state, cursor.sequence), first);
          // What begins where the chunk ends is the next chunk's, if there is one.
          if (time < block.end || time == p.length) {
            cursor = start(cursor.sequence + 1, time, first);
          }
        }
      }
      if (!held_at_once) h.store(block, carry, first);
    }
    __syncthreads();

    ChannelPack<T> y[kRowsPerThread];
    with_flag(gated, [&](auto gated) {
#pragma unroll
      for (int k = 0; k < kRowsPerThread; ++k) {
        A values[kChannelPack], u_values[kChannelPack], gate[kChannelPack];
        load_quads(&memory.y[block.row_of(k)][block.column], values);
        widen(u[k], u_values);
        if constexpr (gated.value) widen(z[k], gate);
#pragma unroll
        for (int j = 0; j < kChannelPack; ++j) {
          values[j] += skip[j] * u_values[j];
          if constexpr (gated.value) values[j] *= silu(gate[j]);
        }
        y[k] = narrowed<T>(values);
      }
    });
    y_output.store_rows(begin, block.row, kRowSpacing, steps, steps == kCudaTile, y);
  }
}

}  // namespace

void cuda_forward(const char* op, const SelectiveScanParams& p, cudaStream_t stream) {
  const int64_t blocks = p.batch * p.chunks * p.groups * cuda_blocks_in_group(p, kChannels);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, forward_kernel<T>, blocks, kChannels, sizeof(Memory<Accumulator<T>>), stream, p);
  });
}

}  // namespace mambablock
