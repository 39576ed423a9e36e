// SPDX-License-Identifier: Apache-2.0
//
// The scan of long rows in parallel. h_t = a_t h_{t-1} + b_t is linear in h, so a chunk of time
// maps the state that enters it to `decay * state + alone`, decay being exp(A sum dt) and `alone`
// what the chunk makes of a state of 0. Two such maps after one another are one again, which an
// associative scan over the chunks uses. The gradient in the other direction,
// x_t = a_t (x_{t+1} + C_t dy_t), goes the same way.
#include <cub/block/block_scan.cuh>

#include "cuda_tiles.cuh"

namespace mambablock {
namespace {

constexpr int kChannels = kCudaForwardChannels;

template <class A>
struct Memory {
  Pack<A, 2> dt_and_input[kCudaTile][kChannels];       // dt, and dt * u or the gradient of y
  alignas(16) A weights[kCudaTile][kStatesAtOnce<A>];  // B, or C
};

// One step of a state, forward or backward.
template <bool kBackward, class A>
__device__ __forceinline__ A advanced(A state, A decay, A input) {
  return kBackward ? decay * (state + input) : decay * state + input;
}

// One step of the tile.
template <bool kBackward, class T>
__device__ __forceinline__ void advance(const Block<T, kChannels>& block,
                                        const Memory<Accumulator<T>>& memory, int step,
                                        const States<Accumulator<T>>& A_log2e,
                                        States<Accumulator<T>>& state, Accumulator<T>& dt_sum) {
  using A = Accumulator<T>;
  constexpr int held = kStatesHeld<A>;
  A weights[held];
  load_quads(memory.weights[step] + block.half * held, weights);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const Pack<A, 2> at = memory.dt_and_input[step][block.channel_of(k)];
    const A dt = at.values[0], input = at.values[1];
    if (k == 0) dt_sum += dt;
#pragma unroll
    for (int n = 0; n < held; ++n) {
      A& value = state.values[k][n];
      value = advanced<kBackward>(value, exp2(dt * A_log2e.values[k][n]), input * weights[n]);
    }
  }
}

// What each chunk makes of a state of 0, into p.carry, and its sum of dt, into p.carry_dt.
template <class T, bool kBackward>
__global__ void __launch_bounds__(kChannels, 1) alone_kernel(const SelectiveScanParams p) {
  using A = Accumulator<T>;
  const Block<T, kChannels> block(p);
  // Nothing needs what leaves the row.
  if (block.chunk == (kBackward ? 0 : p.chunks - 1)) return;
  auto& memory = *reinterpret_cast<Memory<A>*>(shared_memory());
  const bool held_at_once = p.d_state <= kStatesAtOnce<A>;
  const int64_t chunk_row = block.batch * p.chunks + block.chunk;
  A* carry = block.channel_row(p.carry, chunk_row, p.d_state);
  const Sequences& sequences = block.sequences;
  States<A> A_log2e, state;
  const bool gated = kBackward && p.z.data != nullptr;
  const StatesInput<T, kChannels> weights_input(block, kBackward ? p.C : p.B);
  const PackInput<T> main_input = pack_input(block, kBackward ? p.dy : p.u),
                     delta_input = pack_input(block, p.delta), z_input = pack_input(block, p.z);
  A dt_sum = 0, bias[kChannelPack];
#pragma unroll
  for (int j = 0; j < kChannelPack; ++j) bias[j] = block.parameter(p.delta_bias, block.column + j);

  // The state where a sequence begins, in the direction of the kernel.
  const auto load_first = [&](int64_t s, int64_t first) {
    state.load(block, sequence_row(block, kBackward ? p.dfinal_state : p.initial_state, s), first);
  };
  for (int64_t first = 0; first < p.d_state; first += kStatesAtOnce<A>) {
    load_A_log2e(block, first, A_log2e);
    state.load(block, nullptr, first);
    if (!held_at_once) state.store(block, carry, first);
  }
  const int64_t tiles = (block.end - block.begin + kCudaTile - 1) / kCudaTile;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = block.begin + (kBackward ? tiles - 1 - tile : tile) * kCudaTile;
    const int steps = steps_from(begin, block.end);
    __syncthreads();  // all are done with the tile before
    ChannelPack<T> input[kRowsPerThread] = {}, delta[kRowsPerThread] = {}, z[kRowsPerThread] = {};
    main_input.load_rows(begin, block.row, kRowSpacing, steps, steps == kCudaTile, input);
    delta_input.load_rows(begin, block.row, kRowSpacing, steps, steps == kCudaTile, delta);
    if (gated) z_input.load_rows(begin, block.row, kRowSpacing, steps, steps == kCudaTile, z);
    with_flag(p.delta_softplus, [&](auto delta_softplus) {
#pragma unroll
      for (int k = 0; k < kRowsPerThread; ++k) {
        A dt[kChannelPack], values[kChannelPack], gate[kChannelPack];
        widen(delta[k], dt);
        widen(input[k], values);
        if (gated) widen(z[k], gate);
#pragma unroll
        for (int j = 0; j < kChannelPack; ++j) {
          dt[j] = time_step(dt[j], bias[j], delta_softplus.value).value;
          if (!kBackward) values[j] *= dt[j];
          if (gated) values[j] *= silu(gate[j]);
        }
        store_pairs(dt, values, &memory.dt_and_input[block.row_of(k)][block.column]);
      }
    });
    for (int64_t first = 0; first < p.d_state; first += kStatesAtOnce<A>) {
      if (first > 0) __syncthreads();
      weights_input.load(begin, steps, first, &memory.weights[0][0]);
      __syncthreads();
      if (!held_at_once) {
        load_A_log2e(block, first, A_log2e);
        state.load(block, carry, first);
      }
      A sum = 0;
      if constexpr (kBackward) {
        for (int64_t time = begin + steps; time > begin;) {
          const int64_t boundary = sequences.first_from(time);
          if (sequences.begin(boundary) == time) load_first(boundary - 1, first);
          const int64_t stop = max(sequences.begin(boundary - 1), begin);
          const int low = int(stop - begin), high = int(time - begin);
          each_step<kUnrolled<A>>(low, high, [&](int step) {
            advance<kBackward>(block, memory, high - 1 - (step - low), A_log2e, state, sum);
          });
          time = stop;
        }
      } else {
        for (int64_t time = begin; time < begin + steps;) {
          const int64_t boundary = sequences.first_from(time + 1);
          if (sequences.begin(boundary - 1) == time) load_first(boundary - 1, first);
          const int64_t stop = min(sequences.begin(boundary), begin + steps);
          each_step<kUnrolled<A>>(int(time - begin), int(stop - begin), [&](int step) {
            advance<kBackward>(block, memory, step, A_log2e, state, sum);
          });
          time = stop;
        }
      }
      if (first == 0) dt_sum += sum;
      if (!held_at_once) state.store(block, carry, first);
    }
  }
  if (held_at_once) state.store(block, carry, 0);
  if (block.own < block.channels) block.channel_row(p.carry_dt, chunk_row)[block.own] = dt_sum;
}

constexpr int kChunksAtOnce = 128;

// A map of the state: decay * state + alone. One that a boundary of sequences lies in forgets the
// state, NaN included; its decay is negative.
template <class A>
struct Map {
  A decay, alone;
};

struct Then {
  template <class A>
  __device__ Map<A> operator()(const Map<A>& first, const Map<A>& second) const {
    if (second.decay < 0) return second;
    return {first.decay < 0 ? A(-1) : first.decay * second.decay,
            second.decay * first.alone + second.alone};
  }
};

// The map of all chunks that the block has scanned so far.
template <class A>
struct RunningMap {
  Map<A> map;
  __device__ Map<A> operator()(const Map<A>& block_map) {
    const Map<A> before = map;
    map = Then()(before, block_map);
    return before;
  }
};

// Turns p.carry from what each chunk alone gives into what enters it. A block for each channel of
// each row of the batch, a thread for each chunk.
template <class A, bool kBackward>
__global__ void __launch_bounds__(kChunksAtOnce) entering_kernel(const SelectiveScanParams p) {
  using Scan = cub::BlockScan<Map<A>, kChunksAtOnce>;
  auto& storage = *reinterpret_cast<typename Scan::TempStorage*>(shared_memory());
  const int64_t batch = blockIdx.x / p.channels, channel = blockIdx.x % p.channels;
  const Sequences sequences{p.boundaries, p.sequences, p.length, p.reverse};
  for (int64_t n = 0; n < p.d_state; ++n) {
    const A A_log2e = static_cast<const A*>(p.A)[channel * p.d_state + n] * A(1.4426950408889634);
    RunningMap<A> running{{A(-1), A(0)}};
    for (int64_t base = 0; base < p.chunks; base += kChunksAtOnce) {
      const int64_t index = base + threadIdx.x;
      const int64_t chunk = kBackward ? p.chunks - 1 - index : index;
      const int64_t row = (batch * p.chunks + chunk) * p.channels + channel;
      A* carry = static_cast<A*>(p.carry) + row * p.d_state + n;
      Map<A> map{A(-1), A(0)};
      // What leaves the last chunk was not computed.
      if (index < p.chunks - 1) {
        const int64_t begin = chunk * p.chunk_tiles * kCudaTile;
        const int64_t end = min(begin + p.chunk_tiles * kCudaTile, p.length);
        // The backward's state is replaced where a sequence ends, at the chunk's end included.
        const int64_t boundary = sequences.first_from(kBackward ? begin + 1 : begin);
        const bool forgets = sequences.begin(boundary) < (kBackward ? end + 1 : end);
        const A decay = exp2(A_log2e * static_cast<const A*>(p.carry_dt)[row]);
        map = {forgets ? A(-1) : decay, *carry};
      }
      Scan(storage).ExclusiveScan(map, map, Then(), running);
      __syncthreads();
      if (index < p.chunks) *carry = map.alone;
    }
  }
}

template <bool kBackward>
void carries(const char* op, const SelectiveScanParams& p, cudaStream_t stream) {
  const int64_t blocks = p.batch * p.chunks * p.groups * cuda_blocks_in_group(p, kChannels);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, alone_kernel<T, kBackward>, blocks, kChannels, sizeof(Memory<Accumulator<T>>),
           stream, p);
  });
  const auto enter = [&](auto zero) {
    using A = decltype(zero);
    using Storage = typename cub::BlockScan<Map<A>, kChunksAtOnce>::TempStorage;
    launch(op, entering_kernel<A, kBackward>, p.batch * p.channels, kChunksAtOnce, sizeof(Storage),
           stream, p);
  };
  if (p.dtype == DType::float64) {
    enter(double{});
  } else {
    enter(float{});
  }
}

}  // namespace

void cuda_forward_carries(const char* op, const SelectiveScanParams& p, cudaStream_t stream) {
  carries<false>(op, p, stream);
}

void cuda_backward_carries(const char* op, const SelectiveScanParams& p, cudaStream_t stream) {
  carries<true>(op, p, stream);
}

}  // namespace mambablock
