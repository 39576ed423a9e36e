// SPDX-License-Identifier: Apache-2.0
//
// The steps of a tile in the backward: its states and decays are recomputed and stay in registers,
// then the gradient g of the state goes back through them,
//   g_t = C_t dy_t + a_{t+1} g_{t+1}
// and last come the sums over the block's channels.
#pragma once

#include "selective_scan/cuda/states.cuh"

namespace mambablock {

template <class T>
using BackwardBlock = Block<T, kCudaBackwardChannels<Accumulator<T>>, kCudaSavedSteps>;

// A block's shared memory: [step][channel], [step][state], or as said.
template <class T>
struct BackwardMemory {
  using A = Accumulator<T>;
  using Block = BackwardBlock<T>;
  using Vector = AlignedVector<A, kStatesHeld<A>>;
  static constexpr int channels = Block::channels_at_once;

  alignas(16) A delta_bias[channels], D[channels];
  PairTile<A, Block> dt_and_dtu;
  alignas(16) A dy[kCudaSavedSteps][channels];  // of the y before the gate
  PartPairs<A, Block> sums;                     // sum_n g B and sum_n A log2(e) a g h_{t-1}
  PartSums<A, Block> y;                         // C . h
  alignas(16) A B[kCudaSavedSteps][kStatesAtOnce<A>], C[kCudaSavedSteps][kStatesAtOnce<A>];
  // What each thread adds to dB and dC.
  Vector dB_and_dC[kCudaSavedSteps][2][Block::threads];
};

// So that every device can run them.
static_assert(sizeof(BackwardMemory<float>) <= 64 * 1024 &&
              sizeof(BackwardMemory<double>) <= 64 * 1024);

// What a step needs of shared memory.
template <class A>
struct BackwardStepInputs {
  A B[kStatesHeld<A>], C[kStatesHeld<A>], at[4];  // dt and dt * u of both channels
  A dy[2];
};

// The states of a tile on their way forward and back. Those and the decays of kKept steps at a time
// are kept in registers.
template <class T, int kKept>
class BackwardStates {
  using A = Accumulator<T>;
  using Block = BackwardBlock<T>;
  using Memory = BackwardMemory<T>;
  static constexpr int held = kStatesHeld<A>;

 public:
  __device__ BackwardStates(const Block& block, Memory& memory)
      : block(block), memory(memory), pair_place(PairTile<A, Block>::place(block.pair)) {}

  // The states of all steps, from the one on entering them; what they add to dC.
  template <bool kGated>
  __device__ __forceinline__ void recompute(States<A>& h) {
    static_assert(kKept == kCudaSavedSteps);
    BackwardStepInputs<A> inputs = step_inputs(0);
#pragma unroll
    for (int step = 0; step < kKept; ++step) {
      const BackwardStepInputs<A> now = inputs;
      // Read before the stores that follow, which the compiler could not know to be elsewhere.
      inputs = step_inputs((step + 1) % kKept);
      recompute_step<kGated, false>(step, step, now, h);
    }
  }

  // The gradient from the last step to the first, which have just been recomputed. Calls between()
  // once registers have become free.
  template <class F>
  __device__ __forceinline__ void reverse(F between) {
    BackwardStepInputs<A> inputs = step_inputs(kKept - 1);
#pragma unroll
    for (int step = kKept - 1; step >= 0; --step) {
      const BackwardStepInputs<A> now = inputs;
      inputs = step_inputs(step > 0 ? step - 1 : 0);
      if (step == kKept / 2 - 1) between();
      reverse_step<false>(step, step, now);
    }
  }

  // The gradient from step high - 1 to step low, given the state on entering step low.
  template <bool kGated, bool kAdd>
  __device__ __forceinline__ void reverse_some(const States<A>& entering, int low, int high) {
#pragma unroll 1
    for (int first = (high - 1) / kKept * kKept; first + kKept > low; first -= kKept) {
      States<A> h = entering;
#pragma unroll 1
      for (int step = low; step < first; ++step) advance(step, h);
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int step = first + i;
        if (step >= low && step < high) {
          recompute_step<kGated, kAdd>(step, i, step_inputs(step), h);
        }
      }
#pragma unroll
      for (int i = kKept - 1; i >= 0; --i) {
        const int step = first + i;
        if (step >= low && step < high) reverse_step<kAdd>(step, i, step_inputs(step));
      }
    }
  }

  States<A> A_log2e, a_g, dA;  // a_g: a_{t+1} g_{t+1}

 private:
  __device__ __forceinline__ BackwardStepInputs<A> step_inputs(int step) const {
    BackwardStepInputs<A> inputs;
    memory.dt_and_dtu.load(step, pair_place, inputs.at);
    load_vectors(memory.B[step] + block.part * held, inputs.B);
    load_vectors(memory.C[step] + block.part * held, inputs.C);
    const auto dy = *reinterpret_cast<const AlignedVector<A, 2>*>(&memory.dy[step][block.pair]);
    inputs.dy[0] = dy.values[0];
    inputs.dy[1] = dy.values[1];
    return inputs;
  }

  __device__ __forceinline__ void advance(int step, States<A>& h) const {
    const BackwardStepInputs<A> inputs = step_inputs(step);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < held; ++i) {
        A& state = h.values[k][i];
        state = exp2(inputs.at[2 * k] * A_log2e.values[k][i]) * state +
                inputs.at[2 * k + 1] * inputs.B[i];
      }
    }
  }

  template <bool kGated, bool kAdd>
  __device__ __forceinline__ void recompute_step(int step, int place,
                                                 const BackwardStepInputs<A>& inputs,
                                                 States<A>& h) {
    AlignedVector<A, 2>* const y_place =
        reinterpret_cast<AlignedVector<A, 2>*>(&memory.y.parts[block.part].at[step][block.pair]);
    AlignedVector<A, 2> y{};
    if constexpr (kGated && kAdd) y = *y_place;
    typename Memory::Vector dC{};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const A dt = inputs.at[2 * k], dtu = inputs.at[2 * k + 1];
#pragma unroll
      for (int i = 0; i < held; ++i) {
        A& state = h.values[k][i];
        const A decay = exp2(dt * A_log2e.values[k][i]);
        decays[place][k][i] = decay;
        before[place][k][i] = state;
        state = decay * state + dtu * inputs.B[i];
        if constexpr (kGated) y.values[k] += state * inputs.C[i];
        dC.values[i] += inputs.dy[k] * state;
      }
    }
    if constexpr (kGated) *y_place = y;
    memory.dB_and_dC[step][1][threadIdx.x] = dC;
  }

  template <bool kAdd>
  __device__ __forceinline__ void reverse_step(int step, int place,
                                               const BackwardStepInputs<A>& inputs) {
    A(&total)
    [4] = reinterpret_cast<A(&)[4]>(memory.sums.parts[block.part].tile.at[step][pair_place].values);
    A sums[4] = {};  // g B and A log2(e) a g h_{t-1} of both channels
    if constexpr (kAdd) load_vectors(total, sums);
    typename Memory::Vector dB{};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const A dt = inputs.at[2 * k], dtu = inputs.at[2 * k + 1];
#pragma unroll
      for (int i = 0; i < held; ++i) {
        A& a_g_next = a_g.values[k][i];
        const A g = inputs.C[i] * inputs.dy[k] + a_g_next;
        dB.values[i] += g * dtu;
        sums[2 * k] += g * inputs.B[i];
        a_g_next = decays[place][k][i] * g;
        const A a_g_h = a_g_next * before[place][k][i];
        sums[2 * k + 1] += a_g_h * A_log2e.values[k][i];
        dA.values[k][i] += a_g_h * dt;
      }
    }
    memory.dB_and_dC[step][0][threadIdx.x] = dB;
    store_vectors(sums, total);
  }

  const Block& block;
  Memory& memory;
  const int pair_place;
  A decays[kKept][2][held], before[kKept][2][held];
};

// Sums a tile's dB and dC over the block's channels. A thread has a vector of states of either, of
// one step, over every other pair of channels; the thread four lanes further has the others.
template <class T>
struct GradientSums {
  using A = Accumulator<T>;
  using Block = BackwardBlock<T>;
  using Memory = BackwardMemory<T>;
  using Vector = typename Memory::Vector;
  static constexpr int held = kStatesHeld<A>;
  static constexpr int sums_at_once = Block::threads / (2 * kParts);
  static constexpr int rounds = 2 * kCudaSavedSteps / sums_at_once;

  __device__ GradientSums(const Block& block, const SelectiveScanBackward& p, int64_t begin)
      : d_state(p.d_state),
        which(threadIdx.x / (2 * kParts) % 2),
        step(threadIdx.x / (4 * kParts)),
        time(p.dB_partial.time) {  // and dC_partial's
    const OutputView& partial = which == 0 ? p.dB_partial : p.dC_partial;
    target = advanced(static_cast<A*>(partial.data),
                      (block.index_in_group * p.batch + block.batch) * partial.batch +
                          (begin + step) * time + block.group * d_state + block.part * held);
  }

  // To the tile that begins so many steps later.
  __device__ __forceinline__ void move(int64_t steps) { target += steps * time; }

  // Those of states from `first` on.
  template <bool kRegular>
  __device__ __forceinline__ void store(const Block& block, const Memory& memory, int steps,
                                        int64_t first) const {
    const int odd = threadIdx.x / kParts % 2;
    A* place = target;
    if (!kRegular && first > 0) place += first;
#pragma unroll
    for (int round = 0; round < rounds; ++round, place += sums_at_once / 2 * time) {
      const int at = step + round * (sums_at_once / 2);
      const bool exists = at < steps;
      Vector total{};
      if (exists) {
        const Vector* const added = &memory.dB_and_dC[at][which][odd * kParts + block.part];
#pragma unroll
        for (int pair = 0; pair < Block::channels_at_once / 2; pair += 2) {
          const Vector next = added[pair * kParts];
#pragma unroll
          for (int i = 0; i < held; ++i) total.values[i] += next.values[i];
        }
      }
#pragma unroll
      for (int i = 0; i < held; ++i) {
        total.values[i] += __shfl_xor_sync(0xffffffff, total.values[i], kParts);
      }
      if (odd != 0 || !exists) continue;
      const int64_t exist = d_state - first - block.part * held;
      if (kRegular || (d_state % held == 0 && exist > 0)) {
        *reinterpret_cast<Vector*>(place) = total;
      } else {
#pragma unroll
        for (int i = 0; i < held; ++i) {
          if (i < exist) place[i] = total.values[i];
        }
      }
    }
  }

  int64_t d_state;
  int which, step;
  int64_t time;
  A* target;
};

}  // namespace mambablock
