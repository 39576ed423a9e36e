// SPDX-License-Identifier: Apache-2.0
#include "selective_scan/cuda/states.cuh"

namespace mambablock {
namespace {

template <class T>
using ForwardBlock = Block<T, kCudaForwardChannels, kCudaTile>;

// A block's shared memory: [step][channel] or [step][state].
template <class T>
struct Memory {
  using A = Accumulator<T>;
  PairTile<A, ForwardBlock<T>> dt_and_dtu;  // dt, dt * u
  PartSums<A, ForwardBlock<T>> y;           // C . h
  alignas(16) A B[kCudaTile][kStatesAtOnce<A>], C[kCudaTile][kStatesAtOnce<A>];
};

// What a step needs of shared memory.
template <class A>
struct StepInputs {
  A B[kStatesHeld<A>], C[kStatesHeld<A>], at[4];  // dt and dt * u of both channels
};

// A block's way through its chunk. kOneSlice: its registers have room for all states.
template <class T, bool kOneSlice>
class Forward {
  using A = Accumulator<T>;
  using Block = ForwardBlock<T>;
  static constexpr int rows = Block::rows, held = kStatesHeld<A>;

 public:
  __device__ Forward(const SelectiveScanForward& p, const ScanCudaPlan& plan, const Block& block)
      : p(p),
        block(block),
        memory(*reinterpret_cast<Memory<T>*>(shared_memory())),
        carry(plan.carry == nullptr ? nullptr
                                    : block.channel_row(plan.carry, block.chunk_row(), p.d_state)),
        u_input(block, p.u, block.begin),
        delta_input(block, p.delta, block.begin),
        z_input(block, p.z, block.begin),
        B_C_input(block, p.B, p.C, block.begin),
        y_output(block, p.y, block.begin),
        saved(block, p.saved_states, block.begin),
        gated(p.z.data != nullptr),
        pair_place(memory.dt_and_dtu.place(block.pair)),
        regular(kOneSlice && block.is_full() && u_input.in_packs() && delta_input.in_packs() &&
                (!gated || z_input.in_packs()) && p.B.packs && p.C.packs && p.y.packs) {}

  __device__ __forceinline__ void run() {
    enter_chunk();
    if (block.begin == block.end) return;
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      bias[j] = block.parameter(p.delta_bias, block.column + j);
      skip[j] = block.parameter(p.D, block.column + j);
    }
    load(block.steps_from(block.begin));
    for (int64_t begin = block.begin; begin < block.end; begin += kCudaTile) {
      const int steps = block.steps_from(begin), next_steps = block.steps_from(begin + kCudaTile);
      put();
      // In flight while the states advance.
      if (gated) load_z(steps);
      if (next_steps > 0) load(next_steps);
      advance_tile(begin, steps);
      __syncthreads();
      with_flag(regular && steps == kCudaTile, [&](auto regular) { finish<regular.value>(steps); });
      saved.move(kCudaTile / kCudaSavedSteps);
    }
  }

 private:
  // The state that enters the chunk, of each slice.
  __device__ __forceinline__ void enter_chunk() {
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
  }

  __device__ __forceinline__ SequenceCursor start(int64_t s, int64_t time, int64_t first) {
    return start_sequences(
        block.sequences, s, time,
        [&](int64_t s) { h.load(block, sequence_row(block, p.initial_state, s), first); },
        [&](int64_t s) { h.store(block, sequence_row(block, p.final_state, s), first); });
  }

  // A tile's inputs, into registers.
  __device__ __forceinline__ void load(int steps) {
    with_flag(regular && steps == kCudaTile, [&](auto regular) {
      u_input.template load<regular.value>(steps, next_u);
      delta_input.template load<regular.value>(steps, delta);
      if (kOneSlice) B_or_C = B_C_input.template load<regular.value>(steps, 0);
    });
    u_input.move(kCudaTile);
    delta_input.move(kCudaTile);
    if (kOneSlice) B_C_input.move(kCudaTile);
  }

  __device__ __forceinline__ void load_z(int steps) {
    with_flag(regular && steps == kCudaTile,
              [&](auto regular) { z_input.template load<regular.value>(steps, z); });
    z_input.move(kCudaTile);
  }

  // What was loaded, into shared memory.
  __device__ __forceinline__ void put() {
    with_flag(p.delta_softplus, [&](auto delta_softplus) {
#pragma unroll
      for (int k = 0; k < rows; ++k) {
        A u_values[kPack], dt[kPack], dtu[kPack];
        u[k] = next_u[k];
        widen(u[k], u_values);
        widen(delta[k], dt);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          dt[j] = time_step(dt[j], bias[j], delta_softplus.value).value;
          dtu[j] = dt[j] * u_values[j];
        }
        memory.dt_and_dtu.store(block.row_of(k), block.column, dt, dtu);
      }
    });
    if (kOneSlice) B_C_input.put(B_or_C, &memory.B[0][0]);
  }

  // The states through the tile, each slice of them.
  __device__ __forceinline__ void advance_tile(int64_t begin, int steps) {
    const SequenceCursor at_begin = cursor;
    each_slice<kOneSlice, A>(p.d_state, [&](int64_t first) {
      if (!kOneSlice) {
        if (first > 0) __syncthreads();  // all are done with the states before
        B_or_C = B_C_input.template load<false>(steps, first);
        B_C_input.put(B_or_C, &memory.B[0][0]);
        load_A_log2e(block, first, A_log2e);
        h.load(block, carry, first);
        cursor = at_begin;
      }
      __syncthreads();
      // Most tiles lie within one sequence.
      if (steps == kCudaTile && cursor.end > begin + kCudaTile) {
        if (regular) {
          advance_whole<true, false>(first);
        } else {
          with_flag(first > 0, [&](auto add) { advance_whole<false, add.value>(first); });
        }
      } else {
        with_flag(first > 0,
                  [&](auto add) { advance_through_sequences<add.value>(begin, steps, first); });
      }
      if (!kOneSlice) h.store(block, carry, first);
    });
    if (!kOneSlice) B_C_input.move(kCudaTile);
  }

  // All steps of the tile. A step's inputs are read before the sums of the step before are stored,
  // which the compiler could not know to be elsewhere.
  template <bool kRegular, bool kAdd>
  __device__ __forceinline__ void advance_whole(int64_t first) {
    [[maybe_unused]] constexpr int unrolled = kRegular && sizeof(A) == 4 ? kCudaTile : 1;
    StepInputs<A> inputs = step_inputs(0);
#pragma unroll unrolled
    for (int step = 0; step < kCudaTile; ++step) {
      if (step % kCudaSavedSteps == 0 && p.saved_states != nullptr) save<kRegular>(step, first);
      const StepInputs<A> now = inputs;
      inputs = step_inputs((step + 1) % kCudaTile);
      advance<kAdd>(step, now);
    }
  }

  template <bool kAdd>
  __device__ __forceinline__ void advance_through_sequences(int64_t begin, int steps,
                                                            int64_t first) {
    for (int step = 0; step < steps;) {
      const int64_t rest = cursor.end - begin;
      const int stop = rest < steps ? int(rest) : steps;
#pragma unroll 1
      for (; step < stop; ++step) {
        if (p.saved_states != nullptr && step % kCudaSavedSteps == 0) save<false>(step, first);
        advance<kAdd>(step, step_inputs(step));
      }
      const int64_t time = begin + step;
      if (time != cursor.end) break;
      h.store(block, sequence_row(block, p.final_state, cursor.sequence), first);
      // What begins where the chunk ends is the next chunk's, if there is one.
      if (time < block.end || time == p.length) cursor = start(cursor.sequence + 1, time, first);
    }
  }

  template <bool kRegular>
  __device__ __forceinline__ void save(int step, int64_t first) const {
    auto target = saved;
    if (step > 0) target.move(1);
    if constexpr (kRegular) {
      target.store(h);
    } else {
      target.store(first, h);
    }
  }

  __device__ __forceinline__ StepInputs<A> step_inputs(int step) const {
    StepInputs<A> inputs;
    memory.dt_and_dtu.load(step, pair_place, inputs.at);
    load_vectors(memory.B[step] + block.part * held, inputs.B);
    load_vectors(memory.C[step] + block.part * held, inputs.C);
    return inputs;
  }

  // One step. The sums over the states go to y, added to what is there.
  template <bool kAdd>
  __device__ __forceinline__ void advance(int step, const StepInputs<A>& inputs) {
    auto& y =
        *reinterpret_cast<AlignedVector<A, 2>*>(&memory.y.parts[block.part].at[step][block.pair]);
    AlignedVector<A, 2> sums{};
    if constexpr (kAdd) sums = y;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const A dt = inputs.at[2 * k], dtu = inputs.at[2 * k + 1];
#pragma unroll
      for (int i = 0; i < held; ++i) {
        A& state = h.values[k][i];
        state = exp2(dt * A_log2e.values[k][i]) * state + dtu * inputs.B[i];
        sums.values[k] += state * inputs.C[i];
      }
    }
    y = sums;
  }

  // The tile's y, from the sums over the states.
  template <bool kRegular>
  __device__ __forceinline__ void finish(int steps) {
    Pack<T> y[rows];
    with_flag(gated, [&](auto gated) {
#pragma unroll
      for (int k = 0; k < rows; ++k) {
        y[k] = {};
        const int row = block.row_of(k);
        if (!kRegular && row >= steps) continue;
        A values[kPack], u_values[kPack], gate[kPack];
        load_vectors(&memory.y.parts[0].at[row][block.column], values);
#pragma unroll
        for (int i = 1; i < kParts; ++i) {
          add_vectors(&memory.y.parts[i].at[row][block.column], values);
        }
        widen(u[k], u_values);
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

  const SelectiveScanForward& p;
  const Block& block;
  Memory<T>& memory;
  A* carry;
  TileInput<T, Block> u_input, delta_input, z_input;
  StatesInput<T, Block, 2> B_C_input;
  TileOutput<T, Block> y_output;
  SavedStates<T, Block> saved;
  const bool gated;
  const int pair_place;
  const bool regular;
  SequenceCursor cursor{};
  States<A> A_log2e, h;
  A bias[kPack], skip[kPack];
  Pack<T> u[rows] = {}, next_u[rows] = {}, delta[rows] = {}, z[rows] = {}, B_or_C{};
};

template <class T, bool kOneSlice>
__global__ void __launch_bounds__(ForwardBlock<T>::threads, 1)
    forward_kernel(const SelectiveScanForward p, const ScanCudaPlan plan) {
  const ForwardBlock<T> block(p, plan);
  Forward<T, kOneSlice>(p, plan, block).run();
}

}  // namespace

void cuda_forward(const char* op, const SelectiveScanForward& p, const ScanCudaPlan& plan,
                  cudaStream_t stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const bool one_slice = p.d_state <= kStatesAtOnce<Accumulator<T>>;
    launch(op, one_slice ? forward_kernel<T, true> : forward_kernel<T, false>,
           cuda_blocks(p, plan, kCudaForwardChannels), ForwardBlock<T>::threads, sizeof(Memory<T>),
           stream, p, plan);
  });
}

}  // namespace mambablock
