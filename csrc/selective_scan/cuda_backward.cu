// SPDX-License-Identifier: Apache-2.0
//
// Tiles run from the last to the first. Each one's states are computed again from the saved one,
// then the gradient g of the state runs back through them:
//   g_t = C_t dy_t + a_{t+1} g_{t+1}
#include "cuda_tiles.cuh"

namespace mambablock {
namespace {

// What the end of a tile needs of its beginning: the derivative of dt by delta, and the gradient of
// z but for the factor y.
template <class A>
struct Kept {
  A derivative, dz;
};

// Where it is: in registers for blocks of 64 channels, whose shared memory is full, and in shared
// memory for others.
template <class A, int Channels>
struct KeptMemory {
  Kept<A> kept[kRowsPerThread][kChannelPack][Channels];
};
template <class A>
struct KeptMemory<A, 64> {};

// A block's shared memory: [step][channel], [step][state], or as said.
template <class A, int Channels>
struct Memory : KeptMemory<A, Channels> {
  static constexpr int held = kStatesHeld<A>, quads = 2 * held / kQuad<A>;
  using Quad = Pack<A, kQuad<A>>;

  alignas(16) A delta_bias[Channels], D[Channels];
  // Of each of the threads that share a channel's steps.
  A dD[kRowSpacing][Channels], ddelta_bias[kRowSpacing][Channels];
  alignas(16) Pack<A, 2> dt_and_dtu[kCudaTile][Channels];  // dt, dt * u
  A dy[kCudaTile][Channels];                               // of the y before the gate
  alignas(16) Pack<A, 2> sums[kCudaTile][Channels];  // sum_n g B and sum_n A log2(e) a g h_{t-1}
  A y[kCudaTile][Channels];                          // C . h
  alignas(16) A B[kCudaTile][kStatesAtOnce<A>], C[kCudaTile][kStatesAtOnce<A>];
  // Each thread's own: the state before each step; where the gradient has passed it, what the
  // thread adds to dB and dC of the states that it holds. Rows are spread over the banks.
  Quad h_before[kCudaTile][quads][Channels + 2];
};

// So that every device can run blocks of 32 channels.
static_assert(sizeof(Memory<float, 32>) <= 64 * 1024 && sizeof(Memory<double, 32>) <= 64 * 1024);

template <class T, int Channels>
struct Thread {
  using A = Accumulator<T>;
  const Block<T, Channels>& block;
  Memory<A, Channels>& memory;
  States<A> A_log2e, h, a_g, dA;  // a_g: a_{t+1} g_{t+1}
};

// Rows that a thread prepares at once; wide types take many registers.
template <class T>
inline constexpr int kRowsAtOnce = sizeof(T) == 8   ? 1
                                   : sizeof(T) == 4 ? 2
                                                    : kRowsPerThread;

template <class A, int Channels>
struct KeptByThread {
  __device__ explicit KeptByThread(Memory<A, Channels>& memory) : memory(memory) {}
  __device__ __forceinline__ Kept<A>& at(int k, int j) { return memory.kept[k][j][threadIdx.x]; }
  Memory<A, Channels>& memory;
};
template <class A>
struct KeptByThread<A, 64> {
  __device__ explicit KeptByThread(Memory<A, 64>&) {}
  __device__ __forceinline__ Kept<A>& at(int k, int j) { return kept[k][j]; }
  Kept<A> kept[kRowsPerThread][kChannelPack];
};

template <class A>
struct Prepared {
  A dt, dy;  // dy: of the y before the gate
  Kept<A> kept;
};

template <class A>
__device__ __forceinline__ Prepared<A> prepared(A delta, A bias, A dy, A z, bool delta_softplus,
                                                bool gated) {
  const Softplus<A> dt = time_step(delta, bias, delta_softplus);
  if (!gated) return {dt.value, dy, {dt.derivative, A(0)}};
  const A gate = sigmoid(z);
  return {dt.value, dy * z * gate, {dt.derivative, dy * silu_derivative(z, gate)}};
}

// The state of a step again; h is the one before and becomes it.
template <bool kGated, bool kAdd, class T, int Channels>
__device__ __forceinline__ void recompute(Thread<T, Channels>& thread, int step) {
  using A = Accumulator<T>;
  using Quad = typename Memory<A, Channels>::Quad;
  constexpr int held = kStatesHeld<A>;
  const auto& block = thread.block;
  auto& memory = thread.memory;
  const Pack<A, 2> at[2] = {memory.dt_and_dtu[step][block.channel_of(0)],
                            memory.dt_and_dtu[step][block.channel_of(1)]};
  A y[2] = {};
#pragma unroll
  for (int i = 0; i < held; i += kQuad<A>) {
    const Quad B = quad_at(memory.B[step] + block.half * held + i);
    Quad C{};
    if constexpr (kGated) C = quad_at(memory.C[step] + block.half * held + i);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      Quad before;
#pragma unroll
      for (int j = 0; j < kQuad<A>; ++j) {
        A& h = thread.h.values[k][i + j];
        before.values[j] = h;
        h = exp2(at[k].values[0] * thread.A_log2e.values[k][i + j]) * h +
            at[k].values[1] * B.values[j];
        if constexpr (kGated) y[k] += h * C.values[j];
      }
      memory.h_before[step][(k * held + i) / kQuad<A>][block.own] = before;
    }
  }
  if constexpr (kGated) {
    const A sum = sum_of_own(y[0], y[1]);
    memory.y[step][block.own] = kAdd ? memory.y[step][block.own] + sum : sum;
  }
}

// One step of the gradient; h is the state after the step and becomes the one before.
template <bool kAdd, class T, int Channels>
__device__ __forceinline__ void reverse_step(Thread<T, Channels>& thread, int step) {
  using A = Accumulator<T>;
  using Quad = typename Memory<A, Channels>::Quad;
  constexpr int held = kStatesHeld<A>, half_quads = held / kQuad<A>;
  const auto& block = thread.block;
  auto& memory = thread.memory;
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
    // In the place of the states just read.
    memory.h_before[step][i / kQuad<A>][block.own] = dB;
    memory.h_before[step][half_quads + i / kQuad<A>][block.own] = dC;
  }
  Pack<A, 2> sums{sum_of_own(g_B[0], g_B[1]), sum_of_own(g_A[0], g_A[1])};
  auto& total = memory.sums[step][block.own];
  if constexpr (kAdd) {
    sums.values[0] += total.values[0];
    sums.values[1] += total.values[1];
  }
  total = sums;
}

// The tile's dB and dC of states from `first` on, summed over the block's channels.
template <class T, int Channels>
__device__ __forceinline__ void store_group_sums(const Block<T, Channels>& block,
                                                 const Memory<Accumulator<T>, Channels>& memory,
                                                 int64_t begin, int steps, int64_t first) {
  using A = Accumulator<T>;
  using Quad = typename Memory<A, Channels>::Quad;
  constexpr int quads = Memory<A, Channels>::quads, half_quads = quads / 2;
  const SelectiveScanParams& p = block.p;
  const bool in_quads = p.d_state % kQuad<A> == 0;
  for (int i = threadIdx.x; i < steps * 2 * quads; i += Channels) {
    // Neighbouring threads take those that meet different banks.
    const int half = i % 2, quad = i / 2 % quads, step = i / (2 * quads);
    const Quad* contribution = &memory.h_before[step][quad][half];
    Quad total{};
#pragma unroll 4
    for (int pair = 0; pair < Channels / 2; ++pair, contribution += 2) {
#pragma unroll
      for (int j = 0; j < kQuad<A>; ++j) total.values[j] += contribution->values[j];
    }
    const Strided3Out& partial = quad < half_quads ? p.dB_partial : p.dC_partial;
    const int64_t state = first + (half * half_quads + quad % half_quads) * kQuad<A>;
    A* target = static_cast<A*>(partial.data) +
                (block.index_in_group * p.batch + block.batch) * partial.batch +
                (begin + step) * partial.time + block.group * p.d_state + state;
    if (in_quads && state < p.d_state) {
      *reinterpret_cast<Quad*>(target) = total;
    } else {
#pragma unroll
      for (int j = 0; j < kQuad<A>; ++j) {
        if (state + j < p.d_state) target[j] = total.values[j];
      }
    }
  }
}

// A channel's sums over the chunk's time.
template <class T, int Channels>
__device__ __forceinline__ void store_channel_sums(
    const Block<T, Channels>& block, const Accumulator<T> (&sums)[kRowSpacing][Channels],
    void* partial, int64_t row) {
  Accumulator<T> total = 0;
#pragma unroll
  for (int i = 0; i < kRowSpacing; ++i) total += sums[i][block.own];
  if (block.own < block.channels) block.channel_row(partial, row)[block.own] = total;
}

template <class T, int Channels>
__global__ void __launch_bounds__(Channels, 1) backward_kernel(const SelectiveScanParams p) {
  using A = Accumulator<T>;
  const Block<T, Channels> block(p);
  auto& memory = *reinterpret_cast<Memory<A, Channels>*>(shared_memory());
  const Sequences& sequences = block.sequences;
  const bool held_at_once = p.d_state <= kStatesAtOnce<A>;
  const bool gated = p.z.data != nullptr;
  constexpr int rows_at_once = kRowsAtOnce<T>;
  const int64_t row = block.batch * p.chunks + block.chunk;
  A* carry = p.carry == nullptr ? nullptr : block.channel_row(p.carry, row, p.d_state);
  A* dA_row = block.channel_row(p.dA_partial, row, p.d_state);
  Thread<T, Channels> thread{block, memory, {}, {}, {}, {}};

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
#pragma unroll
  for (int i = 0; i < kRowSpacing; ++i) {
    memory.dD[i][block.own] = memory.ddelta_bias[i][block.own] = 0;
  }
  __syncthreads();

  const StatesInput<T, Channels> B_input(block, p.B), C_input(block, p.C);
  const PackInput<T> u_input = pack_input(block, p.u), delta_input = pack_input(block, p.delta),
                     dy_input = pack_input(block, p.dy), z_input = pack_input(block, p.z);
  const PackOutput<T> du_output = pack_output(block, p.du),
                      ddelta_output = pack_output(block, p.ddelta),
                      dz_output = pack_output(block, p.dz);
  const int64_t tiles = (block.end - block.begin + kCudaTile - 1) / kCudaTile;
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t begin = block.begin + tile * kCudaTile;
    const int steps = steps_from(begin, block.end);
    KeptByThread<A, Channels> kept(memory);
    A bias[kChannelPack], dD[kChannelPack];
    load_quads(&memory.delta_bias[block.column], bias);
    load_quads(&memory.dD[block.row][block.column], dD);
#pragma unroll 1
    for (int group = 0; group < kRowsPerThread; group += rows_at_once) {
      const int first_row = block.row_of(group);
      ChannelPack<T> u[rows_at_once] = {}, delta[rows_at_once] = {}, dy[rows_at_once] = {},
                     z[rows_at_once] = {};
      u_input.load_rows(begin, first_row, kRowSpacing, steps, steps == kCudaTile, u);
      delta_input.load_rows(begin, first_row, kRowSpacing, steps, steps == kCudaTile, delta);
      dy_input.load_rows(begin, first_row, kRowSpacing, steps, steps == kCudaTile, dy);
      if (gated) z_input.load_rows(begin, first_row, kRowSpacing, steps, steps == kCudaTile, z);
      with_flag(p.delta_softplus, [&](auto delta_softplus) {
        with_flag(gated, [&](auto gated) {
#pragma unroll
          for (int k = 0; k < rows_at_once; ++k) {
            const int row = first_row + k * kRowSpacing;
            A u_values[kChannelPack], dt[kChannelPack], dtu[kChannelPack], dy_values[kChannelPack],
                gate[kChannelPack];
            widen(u[k], u_values);
            widen(delta[k], dt);
            widen(dy[k], dy_values);
            widen(z[k], gate);
#pragma unroll
            for (int j = 0; j < kChannelPack; ++j) {
              const Prepared<A> at = prepared(dt[j], bias[j], dy_values[j], gate[j],
                                              delta_softplus.value, gated.value);
              kept.at(group + k, j) = at.kept;
              dt[j] = at.dt;
              dtu[j] = at.dt * u_values[j];
              dy_values[j] = at.dy;
              dD[j] += at.dy * u_values[j];
            }
            store_quads(dy_values, &memory.dy[row][block.column]);
            store_pairs(dt, dtu, &memory.dt_and_dtu[row][block.column]);
          }
        });
      });
    }
    store_quads(dD, &memory.dD[block.row][block.column]);
    for (int64_t first = 0; first < p.d_state; first += kStatesAtOnce<A>) {
      if (first > 0) __syncthreads();  // all are done with the states before
      B_input.load(begin, steps, first, &memory.B[0][0]);
      C_input.load(begin, steps, first, &memory.C[0][0]);
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
        const int low = int(stop - begin), high = int(time - begin);
        with_flag(first > 0, [&](auto add) {
          constexpr bool adds = decltype(add)::value;
          with_flag(gated, [&](auto gated) {
            constexpr bool gates = decltype(gated)::value;
            each_step<kUnrolled<A>>(low, high,
                                    [&](int step) { recompute<gates, adds>(thread, step); });
          });
          each_step<kUnrolled<A> == 1 ? 1 : 2>(
              low, high, [&](int step) { reverse_step<adds>(thread, high - 1 - (step - low)); });
        });
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

#pragma unroll 1
    for (int group = 0; group < kRowsPerThread; group += rows_at_once) {
      const int first_row = block.row_of(group);
      ChannelPack<T> u[rows_at_once] = {}, du[rows_at_once], ddelta[rows_at_once], dz[rows_at_once];
      u_input.load_rows(begin, first_row, kRowSpacing, steps, steps == kCudaTile, u);
      with_flag(gated, [&](auto gated) {
#pragma unroll
        for (int k = 0; k < rows_at_once; ++k) {
          constexpr A ln2 = A(0.69314718055994531);
          const int row = first_row + k * kRowSpacing;
          A u_values[kChannelPack], dt[kChannelPack], dtu[kChannelPack], g_B[kChannelPack],
              g_A[kChannelPack], dy[kChannelPack], y[kChannelPack];
          A D[kChannelPack], ddelta_bias[kChannelPack];
          load_quads(&memory.D[block.column], D);
          load_quads(&memory.ddelta_bias[block.row][block.column], ddelta_bias);
          widen(u[k], u_values);
          load_pairs(&memory.dt_and_dtu[row][block.column], dt, dtu);
          load_pairs(&memory.sums[row][block.column], g_B, g_A);
          load_quads(&memory.dy[row][block.column], dy);
          if constexpr (gated.value) load_quads(&memory.y[row][block.column], y);
#pragma unroll
          for (int j = 0; j < kChannelPack; ++j) {
            const Kept<A>& at = kept.at(group + k, j);
            const A du_value = g_B[j] * dt[j] + D[j] * dy[j];
            const A ddelta_value = (g_B[j] * u_values[j] + g_A[j] * ln2) * at.derivative;
            // Rows past the end hold what an earlier tile left.
            if (row < steps) ddelta_bias[j] += ddelta_value;
            if constexpr (gated.value) y[j] = at.dz * (y[j] + D[j] * u_values[j]);
            dt[j] = du_value;
            g_A[j] = ddelta_value;
          }
          store_quads(ddelta_bias, &memory.ddelta_bias[block.row][block.column]);
          du[k] = narrowed<T>(dt);
          ddelta[k] = narrowed<T>(g_A);
          if constexpr (gated.value) dz[k] = narrowed<T>(y);
        }
      });
      du_output.store_rows(begin, first_row, kRowSpacing, steps, steps == kCudaTile, du);
      ddelta_output.store_rows(begin, first_row, kRowSpacing, steps, steps == kCudaTile, ddelta);
      if (gated) dz_output.store_rows(begin, first_row, kRowSpacing, steps, steps == kCudaTile, dz);
    }
    __syncthreads();  // all are done with the tile
  }
  if (held_at_once) thread.dA.store(block, dA_row, 0);
  store_channel_sums(block, memory.dD, p.dD_partial, row);
  store_channel_sums(block, memory.ddelta_bias, p.ddelta_bias_partial, row);
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
