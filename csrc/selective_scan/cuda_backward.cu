// SPDX-License-Identifier: Apache-2.0
//
// Tiles run from the last to the first. Each one's states are computed again from the saved one,
// then the gradient g of the state runs back through them:
//   g_t = C_t dy_t + a_{t+1} g_{t+1}
#include "cuda_tiles.cuh"

namespace mambablock {
namespace {

// Steps whose contributions to dB and dC are summed over the channels at once.
template <class A>
inline constexpr int kStepsSummed = 4;

// A block's shared memory: [step][channel], [step][state], or as said.
template <class A, int Channels>
struct Memory {
  static constexpr int held = kStatesHeld<A>, quads = 2 * held / kQuad<A>, warps = Channels / 32;
  using Quad = Pack<A, kQuad<A>>;

  A delta_bias[Channels], D[Channels];
  Pack<A, 2> dt_and_dtu[kCudaTile][Channels];  // dt, dt * u
  A dy[kCudaTile][Channels];                   // of the y before the gate
  Pack<A, 2> sums[kCudaTile][Channels];        // sum_n g B and sum_n A log2(e) a g h_{t-1}
  A y[kCudaTile][Channels];                    // C . h
  alignas(16) A B[kCudaTile][kStatesAtOnce<A>], C[kCudaTile][kStatesAtOnce<A>];
  Quad h_before[kCudaTile][quads][Channels];  // each thread's own
  // What each thread of a warp adds to dB and dC of the states that it holds, and their sums.
  Quad contributions[warps][kStepsSummed<A>][quads][32];
  Quad warp_sums[warps][kCudaTile][2][quads];
};

template <class T, int Channels>
struct Thread {
  using A = Accumulator<T>;
  const Block<T, Channels>& block;
  Memory<A, Channels>& memory;
  States<A> A_log2e, h, a_g, dA;  // a_g: a_{t+1} g_{t+1}
};

// The thread's packs of a row of a tile.
template <class T>
struct Inputs {
  ChannelPack<T> u, delta, dy, z;
};

// What the end of a tile needs of its beginning: the derivative of dt by delta, and the gradient of
// z but for the factor y.
template <class A>
struct Kept {
  A derivative, dz;
};

// float64 would take too many registers to keep them.
template <class A>
inline constexpr bool kPreparedAgain = sizeof(A) == 8;
template <class A>
inline constexpr int kRowsUnrolled = kPreparedAgain<A> ? 1 : kRowsPerThread;

template <class A>
struct Prepared {
  A dt, dy;  // dy: of the y before the gate
  Kept<A> kept;
};

template <class T, class A = Accumulator<T>>
__device__ __forceinline__ Prepared<A> prepare(const Inputs<T>& inputs, int j, A bias,
                                               bool delta_softplus, bool gated) {
  const Softplus<A> dt = time_step(A(to_accumulator(inputs.delta.values[j])), bias, delta_softplus);
  const A dy = to_accumulator(inputs.dy.values[j]);
  if (!gated) return {dt.value, dy, {dt.derivative, A(0)}};
  const A z = to_accumulator(inputs.z.values[j]), gate = sigmoid(z);
  return {dt.value, dy * z * gate, {dt.derivative, dy * silu_derivative(z, gate)}};
}

// The states of steps [first, last) again; h is the one before and becomes the last one.
template <class T, int Channels>
__device__ __forceinline__ void recompute(Thread<T, Channels>& thread, int first, int last,
                                          bool gated, bool add) {
  using A = Accumulator<T>;
  using Quad = typename Memory<A, Channels>::Quad;
  constexpr int held = kStatesHeld<A>;
  const auto& block = thread.block;
  auto& memory = thread.memory;
#pragma unroll 1
  for (int step = first; step < last; ++step) {
    const Pack<A, 2> at[2] = {memory.dt_and_dtu[step][block.channel_of(0)],
                              memory.dt_and_dtu[step][block.channel_of(1)]};
    A y[2] = {};
#pragma unroll
    for (int i = 0; i < held; i += kQuad<A>) {
      const Quad B = quad_at(memory.B[step] + block.half * held + i);
      Quad C{};
      if (gated) C = quad_at(memory.C[step] + block.half * held + i);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        Quad before;
#pragma unroll
        for (int j = 0; j < kQuad<A>; ++j) {
          A& h = thread.h.values[k][i + j];
          before.values[j] = h;
          h = exp2(at[k].values[0] * thread.A_log2e.values[k][i + j]) * h +
              at[k].values[1] * B.values[j];
          if (gated) y[k] += h * C.values[j];
        }
        memory.h_before[step][(k * held + i) / kQuad<A>][block.own] = before;
      }
    }
    if (gated) {
      const A sum = sum_of_own(y[0], y[1]);
      memory.y[step][block.own] = add ? memory.y[step][block.own] + sum : sum;
    }
  }
}

// One step of the gradient, whose contributions go to place `slot`; h is the state after the step
// and becomes the one before.
template <class T, int Channels>
__device__ __forceinline__ void reverse_step(Thread<T, Channels>& thread, int step, int slot,
                                             bool add) {
  using A = Accumulator<T>;
  using Quad = typename Memory<A, Channels>::Quad;
  constexpr int held = kStatesHeld<A>, half_quads = held / kQuad<A>;
  const auto& block = thread.block;
  auto& memory = thread.memory;
  auto& contributions = memory.contributions[threadIdx.x / 32][slot];
  const int lane = threadIdx.x % 32;
  A dt[2], dtu[2], dy[2], g_B[2] = {}, g_A[2] = {};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const Pack<A, 2> at = memory.dt_and_dtu[step][block.channel_of(k)];
    dt[k] = at.values[0];
    dtu[k] = at.values[1];
    dy[k] = memory.dy[step][block.channel_of(k)];
  }
#pragma unroll
  for (int i = 0; i < held; i += kQuad<A>) {
    const Quad B = quad_at(memory.B[step] + block.half * held + i);
    const Quad C = quad_at(memory.C[step] + block.half * held + i);
    Quad dB{}, dC{};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const Quad before = memory.h_before[step][(k * held + i) / kQuad<A>][block.own];
#pragma unroll
      for (int j = 0; j < kQuad<A>; ++j) {
        const A A_log2e = thread.A_log2e.values[k][i + j];
        A &h = thread.h.values[k][i + j], &a_g = thread.a_g.values[k][i + j];
        const A g = C.values[j] * dy[k] + a_g;
        dB.values[j] += g * dtu[k];
        dC.values[j] += dy[k] * h;
        g_B[k] += g * B.values[j];
        a_g = exp2(dt[k] * A_log2e) * g;
        const A a_g_h = a_g * before.values[j];
        g_A[k] += a_g_h * A_log2e;
        thread.dA.values[k][i + j] += a_g_h * dt[k];
        h = before.values[j];
      }
    }
    contributions[i / kQuad<A>][lane] = dB;
    contributions[half_quads + i / kQuad<A>][lane] = dC;
  }
  Pack<A, 2> sums{sum_of_own(g_B[0], g_B[1]), sum_of_own(g_A[0], g_A[1])};
  auto& total = memory.sums[step][block.own];
  if (add) {
    sums.values[0] += total.values[0];
    sums.values[1] += total.values[1];
  }
  total = sums;
}

// Sums the contributions of `count` steps, the first being step `top`, over the warp's channels.
template <class A, int Channels>
__device__ __forceinline__ void sum_contributions(Memory<A, Channels>& memory, int top, int count) {
  using Quad = typename Memory<A, Channels>::Quad;
  constexpr int quads = Memory<A, Channels>::quads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int sum = lane; sum < count * 2 * quads; sum += 32) {
    const int quad = sum % quads, half = sum / quads % 2, slot = sum / quads / 2;
    Quad total{};
#pragma unroll 4
    for (int pair = 0; pair < 16; ++pair) {
      // Lanes begin at different pairs so that they meet different banks.
      const int from = 2 * ((pair + lane) % 16) + half;
      const Quad one = memory.contributions[warp][slot][quad][from];
#pragma unroll
      for (int j = 0; j < kQuad<A>; ++j) total.values[j] += one.values[j];
    }
    memory.warp_sums[warp][top - slot][half][quad] = total;
  }
}

// Steps [first, last) of one sequence.
template <class T, int Channels>
__device__ __forceinline__ void reverse(Thread<T, Channels>& thread, int first, int last,
                                        bool add) {
  constexpr int at_once = kStepsSummed<Accumulator<T>>;
  for (int top = last - 1; top >= first; top -= at_once) {
    const int count = top - first + 1 < at_once ? top - first + 1 : at_once;
#pragma unroll 1
    for (int slot = 0; slot < count; ++slot) reverse_step(thread, top - slot, slot, add);
    __syncwarp();
    sum_contributions(thread.memory, top, count);
    __syncwarp();
  }
}

// The tile's dB and dC of states from `first` on, summed over the block's warps.
template <class T, int Channels>
__device__ __forceinline__ void store_group_sums(const Block<T, Channels>& block,
                                                 const Memory<Accumulator<T>, Channels>& memory,
                                                 int64_t begin, int steps, int64_t first) {
  using A = Accumulator<T>;
  constexpr int states = kStatesAtOnce<A>, held = kStatesHeld<A>, half_quads = held / kQuad<A>;
  const SelectiveScanParams& p = block.p;
  for (int i = threadIdx.x; i < kCudaTile * 2 * states; i += Channels) {
    const int step = i / (2 * states), which = i / states % 2, state = i % states;
    const int half = state / held, quad = which * half_quads + state % held / kQuad<A>;
    A total = 0;
#pragma unroll
    for (int warp = 0; warp < Memory<A, Channels>::warps; ++warp) {
      total += memory.warp_sums[warp][step][half][quad].values[state % kQuad<A>];
    }
    if (step >= steps || first + state >= p.d_state) continue;
    const Strided3Out& partial = which == 0 ? p.dB_partial : p.dC_partial;
    static_cast<A*>(
        partial.data)[(block.index_in_group * p.batch + block.batch) * partial.batch +
                      (begin + step) * partial.time + block.group * p.d_state + first + state] =
        total;
  }
}

// The sums over the chunk's time of a channel, from each thread that has some of its steps.
template <class T, int Channels>
__device__ __forceinline__ void store_channel_sums(const Block<T, Channels>& block,
                                                   Accumulator<T> (*scratch)[Channels],
                                                   const Accumulator<T> (&sums)[kChannelPack],
                                                   void* partial, int64_t row) {
  using A = Accumulator<T>;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kChannelPack; ++j) scratch[block.row][block.column + j] = sums[j];
  __syncthreads();
  A total = 0;
#pragma unroll
  for (int i = 0; i < kRowSpacing; ++i) total += scratch[i][block.own];
  if (block.own < block.channels) block.channel_row(partial, row)[block.own] = total;
}

template <class T, int Channels>
__global__ void __launch_bounds__(Channels, 1) backward_kernel(const SelectiveScanParams p) {
  using A = Accumulator<T>;
  const Block<T, Channels> block(p);
  auto& memory = *reinterpret_cast<Memory<A, Channels>*>(shared_memory());
  const Sequences& sequences = block.sequences;
  const bool held_at_once = p.d_state <= kStatesAtOnce<A>, gated = p.z.data != nullptr;
  const int64_t row = block.batch * p.chunks + block.chunk;
  A* carry = p.carry == nullptr ? nullptr : block.channel_row(p.carry, row, p.d_state);
  A* dA_row = block.channel_row(p.dA_partial, row, p.d_state);
  Thread<T, Channels> thread{block, memory};

  // A sequence of no steps hands the gradient of its final state to its initial one.
  const auto pass_through = [&](int64_t s, int64_t first) {
    if (p.dinitial_state == nullptr) return;
    States<A> gradient;
    gradient.load(block, sequence_row(block, p.dfinal_state, s), first);
    gradient.store(block, sequence_row(block, p.dinitial_state, s), first);
  };
  for (int64_t first = 0; first < p.d_state; first += kStatesAtOnce<A>) {
    if (block.end == p.length) {
      for (int64_t s = sequences.first_from(p.length); s < p.sequences; ++s) pass_through(s, first);
    }
    load_A_log2e(block, first, thread.A_log2e);
    thread.a_g.load(block, carry, first);
    thread.dA.load(block, nullptr, first);
    if (!held_at_once) thread.dA.store(block, dA_row, first);
  }
  memory.delta_bias[block.own] = block.parameter(p.delta_bias, block.own);
  memory.D[block.own] = block.parameter(p.D, block.own);
  A dD[kChannelPack] = {}, ddelta_bias[kChannelPack] = {};
  __syncthreads();

  const PackInput<T> u_input = pack_input(block, p.u), delta_input = pack_input(block, p.delta),
                     dy_input = pack_input(block, p.dy), z_input = pack_input(block, p.z);
  const PackOutput<T> du_output = pack_output(block, p.du),
                      ddelta_output = pack_output(block, p.ddelta),
                      dz_output = pack_output(block, p.dz);
  const int64_t tiles = (block.end - block.begin + kCudaTile - 1) / kCudaTile;
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t begin = block.begin + tile * kCudaTile;
    const int steps = steps_from(begin, block.end);
    Kept<A> kept[kRowsPerThread][kChannelPack];
    const auto input_at = [&](int k) {
      const int row = block.row_of(k);
      const int64_t time = begin + row;
      return Inputs<T>{u_input.load(time, row < steps), delta_input.load(time, row < steps),
                       dy_input.load(time, row < steps), z_input.load(time, gated && row < steps)};
    };
#pragma unroll(kRowsUnrolled<A>)
    for (int k = 0; k < kRowsPerThread; ++k) {
      const int row = block.row_of(k);
      const Inputs<T> inputs = input_at(k);
#pragma unroll
      for (int j = 0; j < kChannelPack; ++j) {
        const A u = to_accumulator(inputs.u.values[j]);
        const Prepared<A> prepared =
            prepare(inputs, j, memory.delta_bias[block.column + j], p.delta_softplus, gated);
        if constexpr (!kPreparedAgain<A>) kept[k][j] = prepared.kept;
        dD[j] += prepared.dy * u;
        memory.dy[row][block.column + j] = prepared.dy;
        memory.dt_and_dtu[row][block.column + j] = {prepared.dt, prepared.dt * u};
      }
    }
    for (int64_t first = 0; first < p.d_state; first += kStatesAtOnce<A>) {
      if (first > 0) __syncthreads();  // all are done with the states before
      load_states_tile(block, p.B, begin, steps, first, &memory.B[0][0]);
      load_states_tile(block, p.C, begin, steps, first, &memory.C[0][0]);
      __syncthreads();
      if (!held_at_once) {
        load_A_log2e(block, first, thread.A_log2e);
        thread.a_g.load(block, carry, first);
        thread.dA.load(block, dA_row, first);
      }
      for (int64_t time = begin + steps; time > begin;) {
        const int64_t boundary = sequences.first_from(time), s = boundary - 1;
        if (sequences.begin(boundary) == time) {
          thread.a_g.load(block, sequence_row(block, p.dfinal_state, s), first);
        }
        const int64_t start = sequences.begin(s);
        if (start >= begin) {
          thread.h.load(block, sequence_row(block, p.initial_state, s), first);
        } else {
          thread.h.load_saved(block, begin / kCudaTile, first);
        }
        const int64_t stop = start > begin ? start : begin;
        recompute(thread, int(stop - begin), int(time - begin), gated, first > 0);
        reverse(thread, int(stop - begin), int(time - begin), first > 0);
        time = stop;
        if (time == start && p.dinitial_state != nullptr) {
          thread.a_g.store(block, sequence_row(block, p.dinitial_state, s), first);
        }
        for (int64_t empty = s - 1; time == start && empty >= 0 && sequences.begin(empty) == time;
             --empty) {
          pass_through(empty, first);
        }
      }
      if (!held_at_once) {
        thread.a_g.store(block, carry, first);
        thread.dA.store(block, dA_row, first);
      }
      __syncthreads();
      store_group_sums(block, memory, begin, steps, first);
    }

#pragma unroll(kRowsUnrolled<A>)
    for (int k = 0; k < kRowsPerThread; ++k) {
      const int row = block.row_of(k);
      if (row >= steps) continue;
      Inputs<T> inputs;
      if constexpr (kPreparedAgain<A>) {
        inputs = input_at(k);
      } else {
        inputs.u = u_input.load(begin + row, true);
      }
      ChannelPack<T> du, ddelta, dz;
#pragma unroll
      for (int j = 0; j < kChannelPack; ++j) {
        constexpr A ln2 = A(0.69314718055994531);
        const int c = block.column + j;
        const A u = to_accumulator(inputs.u.values[j]), g_B = memory.sums[row][c].values[0],
                g_A = memory.sums[row][c].values[1] * ln2;
        du.values[j] = from_accumulator<T>(g_B * memory.dt_and_dtu[row][c].values[0] +
                                           memory.D[c] * memory.dy[row][c]);
        Kept<A> at;
        if constexpr (kPreparedAgain<A>) {
          at =
              prepare(inputs, j, memory.delta_bias[block.column + j], p.delta_softplus, gated).kept;
        } else {
          at = kept[k][j];
        }
        const A gradient = (g_B * u + g_A) * at.derivative;
        ddelta.values[j] = from_accumulator<T>(gradient);
        ddelta_bias[j] += gradient;
        if (gated) {
          dz.values[j] = from_accumulator<T>(at.dz * (memory.y[row][c] + memory.D[c] * u));
        }
      }
      du_output.store(begin + row, du);
      ddelta_output.store(begin + row, ddelta);
      if (gated) dz_output.store(begin + row, dz);
    }
    __syncthreads();  // all are done with the tile
  }
  if (held_at_once) thread.dA.store(block, dA_row, 0);
  store_channel_sums(block, memory.y, dD, p.dD_partial, row);
  store_channel_sums(block, memory.y, ddelta_bias, p.ddelta_bias_partial, row);
}

template <class F>
void dispatch_block(DType dtype, int channels, F function) {
  dispatch_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) < 8) {
      if (channels == 64) return function(type, std::integral_constant<int, 64>());
    }
    function(type, std::integral_constant<int, 32>());
  });
}

}  // namespace

size_t cuda_backward_shared_memory(DType dtype, int channels) {
  size_t bytes = 0;
  dispatch_block(dtype, channels, [&](auto type, auto block) {
    bytes = sizeof(Memory<Accumulator<decltype(type)>, block.value>);
  });
  return bytes;
}

void cuda_backward(const char* op, const SelectiveScanParams& p, int channels,
                   cudaStream_t stream) {
  const int64_t blocks = p.batch * p.chunks * p.groups * cuda_blocks_in_group(p, channels);
  dispatch_block(p.dtype, channels, [&](auto type, auto block) {
    launch(op, backward_kernel<decltype(type), block.value>, blocks, block.value,
           sizeof(Memory<Accumulator<decltype(type)>, block.value>), stream, p);
  });
}

}  // namespace mambablock
