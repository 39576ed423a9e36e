// SPDX-License-Identifier: Apache-2.0
//
// The steps of a tile in the backward: its states are recomputed, then the gradient g of the state
// goes back through them,
//   g_t = C_t dy_t + a_{t+1} g_{t+1}
// and last come the sums over the block's channels.
#pragma once

#include "selective_scan/cuda/states.cuh"

namespace mambablock {

// A block's shared memory: [step][channel], [step][state], or as said.
template <class A, int Channels>
struct BackwardMemory {
  static constexpr int held = kStatesHeld<A>, vectors = 2 * held / kVectorLength<A>;
  using Vector = AlignedVector<A, kVectorLength<A>>;

  int64_t row;  // of the block's partial sums, for which registers have no room
  alignas(16) A delta_bias[Channels], D[Channels];
  // Of each of the threads that share a channel's steps.
  A dD[kRowThreads][Channels], ddelta_bias[kRowThreads][Channels];
  alignas(16) AlignedVector<A, 2> dt_and_dtu[kCudaTile][Channels];  // dt, dt * u
  A dy[kCudaTile + 1][Channels];                    // [step + 1]: of the y before the gate
  alignas(16) A derivative[kCudaTile][Channels];    // of dt by delta
  A dz[kCudaTile][Channels];                        // but for the factor y
  HalfSums<AlignedVector<A, 2>, Channels> sums[2];  // sum_n g B and sum_n A log2(e) a g h_{t-1}
  A y[kCudaTile][Channels];                         // C . h
  alignas(16) A B[kCudaTile][kStatesAtOnce<A>], C[kCudaTile][kStatesAtOnce<A>];
  // A column for each thread, in the rows below; rows are spread over the banks.
  using VectorRow = Vector[Channels + 2];
  VectorRow own[kCudaTile * vectors + vectors / 2];

  // The states of a step's first and second channel, before the step.
  __device__ VectorRow& h_before(int step, int vector) { return own[step * vectors + vector]; }
  // In their place once the gradient has passed them: what the thread adds to dC of the step
  // before, and to dB.
  __device__ VectorRow& dC_before(int step, int vector) { return own[step * vectors + vector]; }
  __device__ VectorRow& dB(int step, int vector) {
    return own[step * vectors + vectors / 2 + vector];
  }
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

// Recomputes the state of a step; h is the one before and becomes it.
template <bool kGated, bool kAdd, class T, int Channels>
__device__ __forceinline__ void recompute(BackwardThread<T, Channels>& thread, int step) {
  using A = Accumulator<T>;
  using Vector = typename BackwardMemory<A, Channels>::Vector;
  constexpr int held = kStatesHeld<A>;
  const auto& block = thread.block;
  auto& memory = thread.memory;
  A at[4];  // dt and dt * u of both channels
  load_vectors(memory.dt_and_dtu[step][block.pair].values, at);
  A y[2] = {};
#pragma unroll
  for (int i = 0; i < held; i += kVectorLength<A>) {
    const Vector B = vector_at(memory.B[step] + block.half * held + i);
    Vector C{};
    if constexpr (kGated) C = vector_at(memory.C[step] + block.half * held + i);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const A dt = at[2 * k], dtu = at[2 * k + 1];
      Vector before;
#pragma unroll
      for (int j = 0; j < kVectorLength<A>; ++j) {
        A& h = thread.h.values[k][i + j];
        before.values[j] = h;
        h = exp2(dt * thread.A_log2e.values[k][i + j]) * h + dtu * B.values[j];
        if constexpr (kGated) y[k] += h * C.values[j];
      }
      memory.h_before(step, (k * held + i) / kVectorLength<A>)[block.own] = before;
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
__device__ __forceinline__ AlignedVector<Accumulator<T>, 2> dy_before(
    const BackwardThread<T, Channels>& thread, int step) {
  return *reinterpret_cast<const AlignedVector<Accumulator<T>, 2>*>(
      &thread.memory.dy[step][thread.block.pair]);
}

// What the thread adds to dC of the step before `step`, given the state between them.
template <class T, int Channels>
__device__ __forceinline__ void store_dC(BackwardThread<T, Channels>& thread, int step,
                                         const AlignedVector<Accumulator<T>, 2>& dy) {
  using A = Accumulator<T>;
  constexpr int half_vectors = kStatesHeld<A> / kVectorLength<A>;
#pragma unroll
  for (int i = 0; i < half_vectors; ++i) {
    typename BackwardMemory<A, Channels>::Vector dC;
#pragma unroll
    for (int j = 0; j < kVectorLength<A>; ++j) {
      const int n = i * kVectorLength<A> + j;
      dC.values[j] = dy.values[0] * thread.h.values[0][n] + dy.values[1] * thread.h.values[1][n];
    }
    thread.memory.dC_before(step, i)[thread.block.own] = dC;
  }
}

// One step of the gradient, after the states. dy is the step's, and becomes that of the one before.
template <bool kAdd, class T, int Channels>
__device__ __forceinline__ void reverse_step(BackwardThread<T, Channels>& thread, int step,
                                             AlignedVector<Accumulator<T>, 2>& dy) {
  using A = Accumulator<T>;
  using Vector = typename BackwardMemory<A, Channels>::Vector;
  constexpr int held = kStatesHeld<A>;
  const auto& block = thread.block;
  auto& memory = thread.memory;
  A at[4];  // dt and dt * u of both channels
  load_vectors(memory.dt_and_dtu[step][block.pair].values, at);
  AlignedVector<A, 2>* const total = &memory.sums[block.half].at[step][block.pair];
  A sums[4] = {};  // g B and A log2(e) a g h_{t-1} of both channels
  if constexpr (kAdd) load_vectors(total->values, sums);
  Vector dB[held / kVectorLength<A>];
#pragma unroll
  for (int i = 0; i < held; i += kVectorLength<A>) {
    const Vector B = vector_at(memory.B[step] + block.half * held + i);
    const Vector C = vector_at(memory.C[step] + block.half * held + i);
    Vector sum{};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const A dt = at[2 * k], dtu = at[2 * k + 1];
      const Vector before = memory.h_before(step, (k * held + i) / kVectorLength<A>)[block.own];
#pragma unroll
      for (int j = 0; j < kVectorLength<A>; ++j) {
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
    dB[i / kVectorLength<A>] = sum;
  }
  // In the place of the states just read.
#pragma unroll
  for (int i = 0; i < held / kVectorLength<A>; ++i) memory.dB(step, i)[block.own] = dB[i];
  dy = dy_before(thread, step);
  store_dC(thread, step, dy);
  store_vectors(sums, total->values);
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

// Sums a tile's dB and dC over the block's channels. A thread has a vector of states of either,
// of some of the steps.
template <class T, int Channels>
struct GradientSums {
  using A = Accumulator<T>;
  using Memory = BackwardMemory<A, Channels>;
  using Vector = typename Memory::Vector;
  static constexpr int vectors = Memory::vectors, half_vectors = vectors / 2;
  static constexpr int steps_at_once = Channels / (2 * vectors);

  // Neighbouring threads take vectors that are in different banks.
  __device__ GradientSums(const Block<T, Channels>& block, const SelectiveScanBackward& p,
                          int64_t begin)
      : d_state(p.d_state),
        half(threadIdx.x % 2),
        vector(threadIdx.x / 2 % vectors),
        step(threadIdx.x / (2 * vectors)),
        state((half * half_vectors + vector % half_vectors) * kVectorLength<A>),
        time(p.dB_partial.time) {  // and dC_partial's
    const OutputView& partial = vector < half_vectors ? p.dB_partial : p.dC_partial;
    target = static_cast<A*>(partial.data) +
             (block.index_in_group * p.batch + block.batch) * partial.batch +
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
      const Vector* contribution = vector < half_vectors
                                       ? &memory.dB(at, vector)[half]
                                       : &memory.dC_before(at + 1, vector - half_vectors)[half];
      Vector total{};
#pragma unroll
      for (int pair = 0; pair < Channels / 2; ++pair) {
        const Vector added = contribution[2 * pair];
#pragma unroll
        for (int j = 0; j < kVectorLength<A>; ++j) total.values[j] += added.values[j];
      }
      if (at < steps) {
        if (d_state % kVectorLength<A> == 0) {
          if (exist > 0) *reinterpret_cast<Vector*>(place) = total;
        } else {
#pragma unroll
          for (int j = 0; j < kVectorLength<A>; ++j) {
            if (j < exist) place[j] = total.values[j];
          }
        }
      }
      place += steps_at_once * time;
    }
  }

  int64_t d_state;
  int half, vector, step, state;
  int64_t time;
  A* target;
};

}  // namespace mambablock
