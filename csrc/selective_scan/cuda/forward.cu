// SPDX-License-Identifier: Apache-2.0
#include "selective_scan/cuda/forward_steps.cuh"

namespace mambablock {
namespace {

// A block's way through its chunk, whatever the sizes, strides and sequences are: its threads put a
// tile, advance, and finish it.
template <class T, bool kOneSlice>
class Forward {
  using A = Accumulator<T>;
  using Block = ForwardBlock<T>;

 public:
  __device__ Forward(const SelectiveScanForward& p, const ScanCudaPlan& plan, const Block& block)
      : p(p),
        block(block),
        tile(*reinterpret_cast<ForwardTile<T>*>(shared_memory())),
        carry(plan.carry == nullptr ? nullptr
                                    : block.channel_row(plan.carry, block.chunk_row(), p.d_state)),
        states(p, block),
        activations(p, block) {}

  __device__ __forceinline__ void run() {
    enter_chunk();
    for (int64_t begin = block.begin; begin < block.end; begin += kCudaTile) {
      const int steps = block.steps_from(begin);
      activations.load(steps);
      activations.load_z(steps);
      activations.put(tile, steps);
      advance_tile(begin, steps);
      activations.next_B_and_C();
      states.next_tile();
      __syncthreads();
      activations.template finish<false>(tile, steps);
    }
  }

 private:
  // The state that enters the chunk, of each slice.
  __device__ __forceinline__ void enter_chunk() {
    each_slice<kOneSlice, A>(p.d_state, [&](int64_t first) {
      load_A_log2e(block, first, states.A_log2e);
      const int64_t boundary = block.sequences.first_from(block.begin);
      if (boundary < p.sequences && block.sequences.begin(boundary) == block.begin) {
        cursor = start(boundary, block.begin, first);
      } else {
        cursor = {boundary - 1, block.sequences.begin(boundary)};
        states.load(first, carry);
      }
      if (!kOneSlice) states.store(first, carry);
    });
  }

  __device__ __forceinline__ SequenceCursor start(int64_t s, int64_t time, int64_t first) {
    return start_sequences(
        block.sequences, s, time,
        [&](int64_t s) { states.load(first, sequence_row(block, p.initial_state, s)); },
        [&](int64_t s) { states.store(first, sequence_row(block, p.final_state, s)); });
  }

  // The states through the tile, each slice of them.
  __device__ __forceinline__ void advance_tile(int64_t begin, int steps) {
    const SequenceCursor at_begin = cursor;
    each_slice<kOneSlice, A>(p.d_state, [&](int64_t first) {
      if (first > 0) __syncthreads();  // all are done with the states before
      activations.load_B_and_C(steps, first);
      activations.put_B_and_C(tile);
      if (!kOneSlice) {
        load_A_log2e(block, first, states.A_log2e);
        states.load(first, carry);
        cursor = at_begin;
      }
      __syncthreads();
      with_flag(first > 0, [&](auto add) {
        // Most tiles lie within one sequence.
        if (steps == kCudaTile && cursor.end > begin + kCudaTile) {
          states.template advance_whole<false, add.value>(tile, first);
        } else {
          advance_through_sequences<add.value>(begin, steps, first);
        }
      });
      if (!kOneSlice) states.store(first, carry);
    });
  }

  template <bool kAdd>
  __device__ __forceinline__ void advance_through_sequences(int64_t begin, int steps,
                                                            int64_t first) {
    for (int step = 0; step < steps;) {
      const int64_t rest = cursor.end - begin;
      const int stop = rest < steps ? int(rest) : steps;
      states.template advance_some<kAdd>(tile, step, stop, first);
      step = stop;
      const int64_t time = begin + step;
      if (time != cursor.end) break;
      states.store(first, sequence_row(block, p.final_state, cursor.sequence));
      // What begins where the chunk ends is the next chunk's, if there is one.
      if (time < block.end || time == p.length) cursor = start(cursor.sequence + 1, time, first);
    }
  }

  const SelectiveScanForward& p;
  const Block& block;
  ForwardTile<T>& tile;
  A* carry;
  ForwardStates<T> states;
  ForwardActivations<T, Block, false> activations;
  SequenceCursor cursor{};
};

template <class T, bool kOneSlice>
__global__ void __launch_bounds__(ForwardBlock<T>::threads, 1)
    forward_kernel(const SelectiveScanForward p, const ScanCudaPlan plan) {
  const ForwardBlock<T> block(p, plan);
  Forward<T, kOneSlice>(p, plan, block).run();
}

template <class T>
using RowsBlock = Block<T, kCudaForwardChannels, kCudaTile, 2 * kCudaForwardChannels>;
template <class T>
inline constexpr int kRegularThreads = ForwardBlock<T>::threads + RowsBlock<T>::row_threads;

// The same for full blocks whose row is one sequence, by two groups of threads: one advances the
// states through a tile while the other finishes the tile before and puts the one after.
template <class T>
__global__ void __launch_bounds__(kRegularThreads<T>, 2)
    regular_forward_kernel(const SelectiveScanForward p, const ScanCudaPlan plan) {
  using Block = ForwardBlock<T>;
  const Block block(p, plan);
  auto* const buffers = reinterpret_cast<ForwardTile<T>*>(shared_memory());
  const int tiles = int((block.end - block.begin + kCudaTile - 1) / kCudaTile);
  const auto steps_of = [&](int tile) {
    return block.steps_from(block.begin + int64_t(tile) * kCudaTile);
  };
  if (threadIdx.x < Block::threads) {
    ForwardStates<T> states(p, block);
    load_A_log2e(block, 0, states.A_log2e);
    states.load(0, block.begin > 0 ? block.channel_row(plan.carry, block.chunk_row(), p.d_state)
                                   : sequence_row(block, p.initial_state, 0));
    for (int tile = 0; tile < tiles; ++tile) {
      __syncthreads();
      states.template advance_whole<true, false>(buffers[tile % 2], 0);
      states.next_tile();
    }
    __syncthreads();
    if (block.end == p.length) states.store(0, sequence_row(block, p.final_state, 0));
  } else {
    const RowsBlock<T> rows_block(p, plan);
    ForwardActivations<T, RowsBlock<T>, true> activations(p, rows_block);
    const auto load = [&](int tile) {
      activations.load(steps_of(tile));
      activations.load_B_and_C(steps_of(tile), 0);
      activations.next_B_and_C();
    };
    const auto put = [&](int tile) {
      activations.put(buffers[tile % 2], steps_of(tile));
      activations.put_B_and_C(buffers[tile % 2]);
    };
    load(0);
    put(0);
    if (tiles > 1) load(1);
    for (int tile = 0; tile < tiles; ++tile) {
      __syncthreads();
      if (tile + 1 < tiles) put(tile + 1);
      if (tile + 2 < tiles) load(tile + 2);
      if (tile > 0) activations.template finish<true>(buffers[(tile - 1) % 2], kCudaTile);
      activations.load_z(steps_of(tile));
    }
    __syncthreads();
    activations.template finish<false>(buffers[(tiles - 1) % 2], steps_of(tiles - 1));
  }
}

}  // namespace

void cuda_forward(const char* op, const SelectiveScanForward& p, const ScanCudaPlan& plan,
                  cudaStream_t stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const bool one_slice = p.d_state <= kStatesAtOnce<Accumulator<T>>;
    // In float64 it would not fit in the registers.
    if constexpr (sizeof(Accumulator<T>) == 4) {
      if (is_regular(p, plan, kCudaForwardChannels, kStatesAtOnce<float>) && p.y.packs) {
        return launch(op, regular_forward_kernel<T>, cuda_blocks(p, plan, kCudaForwardChannels),
                      kRegularThreads<T>, 2 * sizeof(ForwardTile<T>), stream, p, plan);
      }
    }
    launch(op, one_slice ? forward_kernel<T, true> : forward_kernel<T, false>,
           cuda_blocks(p, plan, kCudaForwardChannels), ForwardBlock<T>::threads,
           sizeof(ForwardTile<T>), stream, p, plan);
  });
}

}  // namespace mambablock
