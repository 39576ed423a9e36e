// SPDX-License-Identifier: Apache-2.0
//
// Tiles are visited from the last to the first. The states of each are recomputed from the saved
// one, then the gradient of the state goes back through them.
#include "selective_scan/cuda/backward_activations.cuh"

namespace mambablock {
namespace {

// Where the last tile of a block's chunk begins.
template <class Block>
__device__ int64_t last_tile(const Block& block) {
  const int64_t steps = block.end - block.begin;
  return block.begin + (steps > 0 ? (steps - 1) / kCudaSavedSteps * kCudaSavedSteps : 0);
}

// A block's way through its chunk, whatever the sizes, strides and sequences are.
template <class T>
class Backward {
  using A = Accumulator<T>;
  using Block = BackwardBlock<T>;
  using Memory = BackwardMemory<T>;
  static constexpr int tile = kCudaSavedSteps;

 public:
  __device__ Backward(const SelectiveScanBackward& p, const ScanCudaPlan& plan, const Block& block,
                      Memory& memory)
      : p(p),
        plan(plan),
        block(block),
        sequences(block.sequences),
        memory(memory),
        one_slice(p.d_state <= kStatesAtOnce<A>),
        last(last_tile(block)),
        activations(p, block, memory, last),
        gradient_sums(block, p, last),
        states(block, memory) {}

  __device__ __forceinline__ void run() {
    for (int64_t first = 0; first < p.d_state; first += kStatesAtOnce<A>) enter_chunk(first);
    __syncthreads();
    for (int64_t begin = last; begin >= block.begin && begin < block.end; begin -= tile) {
      const int steps = block.steps_from(begin);
      activations.load(steps);
      activations.put(steps);
      const Cursor at_end = cursor;
      for (int64_t first = 0; first < p.d_state; first += kStatesAtOnce<A>) {
        cursor = at_end;
        reverse_slice(begin, steps, first);
      }
      activations.next_states();
      gradient_sums.move(-tile);
      activations.finish(steps);
      __syncthreads();  // all are done with the tile
    }
    if (one_slice) states.dA.store(block, dA_row(), 0);
    activations.store_channel_sums();
  }

 private:
  // The sequence that the step before some time belongs to, and where it begins.
  struct Cursor {
    int64_t sequence, begin;
  };

  __device__ __forceinline__ A* carry_row() const {
    if (plan.carry == nullptr) return nullptr;
    return block.channel_row(plan.carry, block.chunk_row(), p.d_state);
  }
  __device__ __forceinline__ A* dA_row() const {
    return block.channel_row(p.dA_partial, block.chunk_row(), p.d_state);
  }

  // The gradient that enters the chunk at its end.
  __device__ __forceinline__ void enter_chunk(int64_t first) {
    if (block.end == p.length) {
      for (int64_t s = sequences.first_from(p.length); s < p.sequences; ++s) pass_through(s, first);
    }
    load_A_log2e(block, first, states.A_log2e);
    states.a_g.load(block, carry_row(), first);
    states.dA.load(block, nullptr, first);
    if (block.begin < block.end) cursor = enter(block.end, first);
    if (one_slice) return;
    states.a_g.store(block, carry_row(), first);
    states.dA.store(block, dA_row(), first);
  }

  // A sequence of no steps hands the gradient of its final state to its initial one.
  __device__ __forceinline__ void pass_through(int64_t s, int64_t first) {
    if (p.dinitial_state == nullptr) return;
    States<A> gradient;
    gradient.load(block, sequence_row(block, p.dfinal_state, s), first);
    gradient.store(block, sequence_row(block, p.dinitial_state, s), first);
  }

  // Where a sequence ends at `time`, the gradient begins with that of its final state.
  __device__ __forceinline__ Cursor enter(int64_t time, int64_t first) {
    const int64_t boundary = sequences.first_from(time), s = boundary - 1;
    if (sequences.begin(boundary) == time) {
      states.a_g.load(block, sequence_row(block, p.dfinal_state, s), first);
    }
    return {s, sequences.begin(s)};
  }

  // A slice of the states through the tile, and the gradient back.
  __device__ __forceinline__ void reverse_slice(int64_t begin, int steps, int64_t first) {
    if (!one_slice) {
      load_A_log2e(block, first, states.A_log2e);
      states.a_g.load(block, carry_row(), first);
      states.dA.load(block, dA_row(), first);
    }
    activations.load_states(steps, first);
    activations.put_B_and_C();
    __syncthreads();
    with_flag(p.z.data != nullptr, [&](auto gated) {
      with_flag(first > 0, [&](auto add) {
        reverse_through_sequences<gated.value, add.value>(begin, steps, first);
      });
    });
    if (!one_slice) {
      states.a_g.store(block, carry_row(), first);
      states.dA.store(block, dA_row(), first);
    }
    __syncthreads();
    gradient_sums.template store<false>(block, memory, steps, first);
    if (!one_slice) __syncthreads();  // all are done with the states
  }

  template <bool kGated, bool kAdd>
  __device__ __forceinline__ void reverse_through_sequences(int64_t begin, int steps,
                                                            int64_t first) {
    for (int64_t time = begin + steps; time > begin;) {
      const int64_t s = cursor.sequence, stop = max(cursor.begin, begin);
      States<A> h = activations.entering_state();
      if (cursor.begin >= begin) h.load(block, sequence_row(block, p.initial_state, s), first);
      states.template reverse_some<kGated, kAdd>(h, int(stop - begin), int(time - begin));
      time = stop;
      if (time > cursor.begin) break;
      if (p.dinitial_state != nullptr) {
        states.a_g.store(block, sequence_row(block, p.dinitial_state, s), first);
      }
      for (int64_t empty = s - 1; empty >= 0 && sequences.begin(empty) == time; --empty) {
        pass_through(empty, first);
      }
      // What ends where the chunk begins is the chunk before's.
      if (time > block.begin) cursor = enter(time, first);
    }
  }

  const SelectiveScanBackward& p;
  const ScanCudaPlan& plan;
  const Block& block;
  const Sequences& sequences;
  Memory& memory;
  const bool one_slice;
  const int64_t last;
  BackwardActivations<T, false> activations;
  GradientSums<T> gradient_sums;
  BackwardStates<T, kCudaSavedSteps * 2 / int(sizeof(A))> states;
  Cursor cursor{};
};

template <class T>
__global__ void __launch_bounds__(BackwardBlock<T>::threads, 1)
    backward_kernel(const SelectiveScanBackward p, const ScanCudaPlan plan) {
  const BackwardBlock<T> block(p, plan);
  auto& memory = *reinterpret_cast<BackwardMemory<T>*>(shared_memory());
  Backward<T>(p, plan, block, memory).run();
}

// The same for full blocks whose row is one sequence.
template <class T>
__global__ void __launch_bounds__(BackwardBlock<T>::threads, 1)
    regular_backward_kernel(const SelectiveScanBackward p, const ScanCudaPlan plan) {
  using A = Accumulator<T>;
  constexpr int tile = kCudaSavedSteps;
  const BackwardBlock<T> block(p, plan);
  auto& memory = *reinterpret_cast<BackwardMemory<T>*>(shared_memory());
  const int64_t last = last_tile(block);
  BackwardStates<T, tile> states(block, memory);
  load_A_log2e(block, 0, states.A_log2e);
  const A* const carry = block.end < p.length
                             ? block.channel_row(plan.carry, block.chunk_row(), p.d_state)
                             : sequence_row(block, p.dfinal_state, 0);
  states.a_g.load(block, carry, 0);
  states.dA.load(block, nullptr, 0);
  BackwardActivations<T, true> activations(p, block, memory, last);
  GradientSums<T> gradient_sums(block, p, last);
  const auto load = [&](int steps) {
    activations.load(steps);
    activations.load_states(steps, 0);
    activations.next_states();
  };
  int steps = block.steps_from(last);  // of the last tile; the others have all
  load(steps);
  __syncthreads();
  for (int left = int((last - block.begin) / tile); left >= 0; --left) {
    activations.put(steps);
    activations.put_B_and_C();
    auto h = activations.entering_state();
    __syncthreads();
    with_flag(p.z.data != nullptr, [&](auto gated) { states.template recompute<gated.value>(h); });
    states.reverse([&] {
      if (left > 0) load(tile);
    });
    __syncthreads();
    gradient_sums.template store<true>(block, memory, steps, 0);
    gradient_sums.move(-tile);
    activations.finish(steps);
    steps = tile;
  }
  if (block.begin == 0 && p.dinitial_state != nullptr) {
    states.a_g.store(block, sequence_row(block, p.dinitial_state, 0), 0);
  }
  states.dA.store(block, block.channel_row(p.dA_partial, block.chunk_row(), p.d_state), 0);
  activations.store_channel_sums();
}

}  // namespace

void cuda_backward(const char* op, const SelectiveScanBackward& p, const ScanCudaPlan& plan,
                   cudaStream_t stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    using Block = BackwardBlock<T>;
    auto* kernel = backward_kernel<T>;
    // In float64 it would not fit in the registers.
    if constexpr (sizeof(Accumulator<T>) == 4) {
      if (is_regular(p, plan, Block::channels_at_once, kStatesAtOnce<float>) && in_packs(p.dy) &&
          p.du.packs && p.ddelta.packs && (p.z.data == nullptr || p.dz.packs)) {
        kernel = regular_backward_kernel<T>;
      }
    }
    launch(op, kernel, cuda_blocks(p, plan, Block::channels_at_once), Block::threads,
           sizeof(BackwardMemory<T>), stream, p, plan);
  });
}

}  // namespace mambablock
