// SPDX-License-Identifier: Apache-2.0
//
// The steps of a tile in the backward: its states again, then the gradient g of the state back
// through them,
//   g_t = C_t dy_t + a_{t+1} g_{t+1}
// and last the sums over the block's channels.
#pragma once

#include "selective_scan/cuda/states.cuh"

namespace mambablock {

// A block's shared memory: [step][channel], [step][state], or as said.
template <class A, int Channels>
struct BackwardMemory {
  static constexpr int held = kStatesHeld<A>, quads = 2 * held / kQuad<A>;
  using Quad = Pack<A, kQuad<A>>;

  int64_t row;  // the block's of partial sums, for which registers have no room
  alignas(16) A delta_bias[Channels], D[Channels];
  // Of each of the threads that share a channel's steps.
  A dD[kRowThreads][Channels], ddelta_bias[kRowThreads][Channels];
  alignas(16) Pack<A, 2> dt_and_dtu[kCudaTile][Channels];  // dt, dt * u
  A dy[kCudaTile + 1][Channels];                           // [step + 1]: of the y before the gate
  alignas(16) A derivative[kCudaTile][Channels];           // of dt by delta
  A dz[kCudaTile][Channels];                               // but for the factor y
  HalfSums<Pack<A, 2>, Channels> sums[2];  // sum_n g B and sum_n A log2(e) a g h_{t-1}
  A y[kCudaTile][Channels];                // C . h
  alignas(16) A B[kCudaTile][kStatesAtOnce<A>], C[kCudaTile][kStatesAtOnce<A>];
  // Each thread's own, in the places below; rows are spread over the banks.
  using QuadRow = Quad[Channels + 2];
  QuadRow own[kCudaTile * quads + quads / 2];

  // The states of a step's first and second channel, before the step.
  __device__ QuadRow& h_before(int step, int quad) { return own[step * quads + quad]; }
  // Where the gradient has passed them: what the thread adds to dC of the step before, and to dB.
  __device__ QuadRow& dC_before(int step, int quad) { return own[step * quads + quad]; }
  __device__ QuadRow& dB(int step, int quad) { return own[step * quads + quads / 2 + quad]; }
};

// So that every device can run blocks of 32 channels.
static_assert(sizeof(BackwardMemory<float, 32>) <= 64 * 1024 &&
              sizeof(BackwardMemory<double, 32>) <= 64 * 1024);

template <class T, int Channels>
struct BackwardThread {
  using A = Accumulator<T>;
  const Block<T, Channels>& block;
  BackwardMemory<A, Channels>& memory;
  States<A> A_log2e, h, a_g, dA;  // a_g: a_{t+1} g_{t+1}
};

// The state of a step again; h is the one before and becomes it.
template <bool kGated, bool kAdd, class T, int Channels>
__device__ __forceinline__ void recompute(BackwardThread<T, Channels>& thread, int step) {
  using A = Accumulator<T>;
  using Quad = typename BackwardMemory<A, Channels>::Quad;
  constexpr int held = kStatesHeld<A>;
  const auto& block = thread.block;
  auto& memory = thread.memory;
  A at[4];  // dt and dt * u of both channels
  load_quads(memory.dt_and_dtu[step][block.pair].values, at);
  A y[2] = {};
#pragma unroll
  for (int i = 0; i < held; i += kQuad<A>) {
    const Quad B = quad_at(memory.B[step] + block.half * held + i);
    Quad C{};
    if constexpr (kGated) C = quad_at(memory.C[step] + block.half * held + i);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const A dt = at[2 * k], dtu = at[2 * k + 1];
      Quad before;
#pragma unroll
      for (int j = 0; j < kQuad<A>; ++j) {
        A& h = thread.h.values[k][i + j];
        before.values[j] = h;
        h = exp2(dt * thread.A_log2e.values[k][i + j]) * h + dtu * B.values[j];
        if constexpr (kGated) y[k] += h * C.values[j];
      }
      memory.h_before(step, (k * held + i) / kQuad<A>)[block.own] = before;
    }
  }
  if constexpr (kGated) {
    // Each thread of the pair sums up its own channel's.
    const A own = block.half ? y[1] : y[0], neighbours = block.half ? y[0] : y[1];
    const A sum = own + __shfl_xor_sync(0xffffffff, neighbours, 1);
    memory.y[step][block.own] = kAdd ? memory.y[step][block.own] + sum : sum;
  }
}

// The states of steps [low, high).
template <int kUnroll, bool kGated, bool kAdd, class T, int Channels>
__device__ __forceinline__ void recompute_steps(BackwardThread<T, Channels>& thread, int low,
                                                int high) {
#pragma unroll kUnroll
  for (int step = low; step < high; ++step) recompute<kGated, kAdd>(thread, step);
}

// The gradients of y, before the gate, of both of the thread's channels.
template <class T, int Channels>
__device__ __forceinline__ Pack<Accumulator<T>, 2> dy_before(
    const BackwardThread<T, Channels>& thread, int step) {
  return *reinterpret_cast<const Pack<Accumulator<T>, 2>*>(
      &thread.memory.dy[step][thread.block.pair]);
}

// What the thread adds to dC of the step before `step`, given the state between them.
template <class T, int Channels>
__device__ __forceinline__ void store_dC(BackwardThread<T, Channels>& thread, int step,
                                         const Pack<Accumulator<T>, 2>& dy) {
  using A = Accumulator<T>;
  constexpr int half_quads = kStatesHeld<A> / kQuad<A>;
#pragma unroll
  for (int i = 0; i < half_quads; ++i) {
    typename BackwardMemory<A, Channels>::Quad dC;
#pragma unroll
    for (int j = 0; j < kQuad<A>; ++j) {
      const int n = i * kQuad<A> + j;
      dC.values[j] = dy.values[0] * thread.h.values[0][n] + dy.values[1] * thread.h.values[1][n];
    }
    thread.memory.dC_before(step, i)[thread.block.own] = dC;
  }
}

// One step of the gradient, after the states. dy is the step's, and becomes that of the one before.
template <bool kAdd, class T, int Channels>
__device__ __forceinline__ void reverse_step(BackwardThread<T, Channels>& thread, int step,
                                             Pack<Accumulator<T>, 2>& dy) {
  using A = Accumulator<T>;
  using Quad = typename BackwardMemory<A, Channels>::Quad;
  constexpr int held = kStatesHeld<A>;
  const auto& block = thread.block;
  auto& memory = thread.memory;
  A at[4];  // dt and dt * u of both channels
  load_quads(memory.dt_and_dtu[step][block.pair].values, at);
  Pack<A, 2>* const total = &memory.sums[block.half].at[step][block.pair];
  A sums[4] = {};  // g B and A log2(e) a g h_{t-1} of both channels
  if constexpr (kAdd) load_quads(total->values, sums);
  Quad dB[held / kQuad<A>];
#pragma unroll
  for (int i = 0; i < held; i += kQuad<A>) {
    const Quad B = quad_at(memory.B[step] + block.half * held + i);
    const Quad C = quad_at(memory.C[step] + block.half * held + i);
    Quad sum{};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const A dt = at[2 * k], dtu = at[2 * k + 1];
      const Quad before = memory.h_before(step, (k * held + i) / kQuad<A>)[block.own];
#pragma unroll
      for (int j = 0; j < kQuad<A>; ++j) {
        const A A_log2e = thread.A_log2e.values[k][i + j];
        A &h = thread.h.values[k][i + j], &a_g = thread.a_g.values[k][i + j];
        h = before.values[j];
        const A g = C.values[j] * dy.values[k] + a_g;
        sum.values[j] += g * dtu;
        sums[2 * k] += g * B.values[j];
        a_g = exp2(dt * A_log2e) * g;
        const A a_g_h = a_g * h;
        sums[2 * k + 1] += a_g_h * A_log2e;
        thread.dA.values[k][i + j] += a_g_h * dt;
      }
    }
    dB[i / kQuad<A>] = sum;
  }
  // In the place of the states just read.
#pragma unroll
  for (int i = 0; i < held / kQuad<A>; ++i) memory.dB(step, i)[block.own] = dB[i];
  dy = dy_before(thread, step);
  store_dC(thread, step, dy);
  store_quads(sums, total->values);
}

// The gradient of steps from the last to the first of [low, high), which have just been recomputed.
template <int kUnroll, bool kAdd, class T, int Channels>
__device__ __forceinline__ void reverse_steps(BackwardThread<T, Channels>& thread, int low,
                                              int high) {
  auto dy = dy_before(thread, high);
  store_dC(thread, high, dy);
#pragma unroll kUnroll
  for (int step = high - 1; step >= low; --step) reverse_step<kAdd>(thread, step, dy);
}

// Sums a tile's dB and dC over the block's channels. A thread has a quad of states of either, of
// some of the steps.
template <class T, int Channels>
struct GroupSums {
  using A = Accumulator<T>;
  using Memory = BackwardMemory<A, Channels>;
  using Quad = typename Memory::Quad;
  static constexpr int quads = Memory::quads, half_quads = quads / 2;
  static constexpr int steps_at_once = Channels / (2 * quads);

  // Neighbouring threads take quads that are in different banks.
  __device__ GroupSums(const Block<T, Channels>& block, int64_t begin)
      : d_state(block.p.d_state),
        half(threadIdx.x % 2),
        quad(threadIdx.x / 2 % quads),
        step(threadIdx.x / (2 * quads)),
        state((half * half_quads + quad % half_quads) * kQuad<A>),
        time(block.p.dB_partial.time) {  // and dC_partial's
    const Strided3Out& partial = quad < half_quads ? block.p.dB_partial : block.p.dC_partial;
    target = static_cast<A*>(partial.data) +
             (block.index_in_group * block.p.batch + block.batch) * partial.batch +
             (begin + step) * time + block.group * d_state + state;
  }

  // To the tile that begins so many steps later.
  __device__ __forceinline__ void move(int64_t steps) { target += steps * time; }

  // Those of states from `first` on.
  __device__ __forceinline__ void store(Memory& memory, int steps, int64_t first) const {
    A* place = target;
    if (first > 0) place += first;
    const int64_t exist = d_state - first - state;
#pragma unroll
    for (int round = 0; round < kCudaTile / steps_at_once; ++round) {
      const int at = step + round * steps_at_once;
      const Quad* contribution = quad < half_quads
                                     ? &memory.dB(at, quad)[half]
                                     : &memory.dC_before(at + 1, quad - half_quads)[half];
      Quad total{};
#pragma unroll
      for (int pair = 0; pair < Channels / 2; ++pair) {
        const Quad added = contribution[2 * pair];
#pragma unroll
        for (int j = 0; j < kQuad<A>; ++j) total.values[j] += added.values[j];
      }
      if (at < steps) {
        if (d_state % kQuad<A> == 0) {
          if (exist > 0) *reinterpret_cast<Quad*>(place) = total;
        } else {
#pragma unroll
          for (int j = 0; j < kQuad<A>; ++j) {
            if (j < exist) place[j] = total.values[j];
          }
        }
      }
      place += steps_at_once * time;
    }
  }

  int64_t d_state;
  int half, quad, step, state;
  int64_t time;
  A* target;
};

}  // namespace mambablock
