// SPDX-License-Identifier: Apache-2.0
//
// The scan of long rows in parallel. h_t = a_t h_{t-1} + b_t is linear in h, so a chunk of time
// maps the state that enters it to `decay * state + alone`, decay being exp(A sum dt) and `alone`
// what the chunk makes of a state of 0. Two such maps after one another are one again, which an
// associative scan over the chunks uses. The gradient in the other direction,
// x_t = a_t (x_{t+1} + C_t dy_t), goes the same way.
#include <cub/block/block_scan.cuh>

#include "selective_scan/cuda/states.cuh"

namespace mambablock {
namespace {

constexpr int kChannels = kCudaForwardChannels;

template <class A>
struct Memory {
  // dt, and dt * u or the gradient of y
  alignas(16) Pack<A, 2> dt_and_input[kCudaTile][kChannels];
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
                                        States<Accumulator<T>>& state,
                                        Accumulator<T> (&dt_sum)[2]) {
  using A = Accumulator<T>;
  constexpr int held = kStatesHeld<A>;
  A weights[held], at[4];  // dt and input of both channels
  load_quads(memory.weights[step] + block.half * held, weights);
  load_quads(memory.dt_and_input[step][block.pair].values, at);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const A dt = at[2 * k], input = at[2 * k + 1];
    dt_sum[k] += dt;
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
  const int64_t tiles = (block.end - block.begin + kCudaTile - 1) / kCudaTile;
  const int64_t first_begin = block.begin + (kBackward ? (tiles - 1) * kCudaTile : 0);
  constexpr int64_t next = kBackward ? -kCudaTile : kCudaTile;
  const Strided4& B_or_C = kBackward ? p.C : p.B;
  StatesInput<T, kChannels> weights_input(block, B_or_C, first_begin);
  TileInput<T> main_input(block, kBackward ? p.dy : p.u, first_begin),
      delta_input(block, p.delta, first_begin), z_input(block, p.z, first_begin);
  const bool packs =
      main_input.in_packs() && delta_input.in_packs() && (!gated || z_input.in_packs());
  A dt_sum[2] = {}, bias[kPack];
#pragma unroll
  for (int j = 0; j < kPack; ++j) bias[j] = block.parameter(p.delta_bias, block.column + j);

  // The state where a sequence begins, in the direction of the kernel.
  const auto load_first = [&](int64_t s, int64_t first) {
    state.load(block, sequence_row(block, kBackward ? p.dfinal_state : p.initial_state, s), first);
  };
  for (int64_t first = 0; first < p.d_state; first += kStatesAtOnce<A>) {
    load_A_log2e(block, first, A_log2e);
    state.load(block, nullptr, first);
    if (!held_at_once) state.store(block, carry, first);
  }
  int64_t begin = first_begin;
  for (int64_t tile = 0; tile < tiles; ++tile, begin += next) {
    const int steps = steps_from(begin, block.end);
    __syncthreads();  // all are done with the tile before
    ChannelPack<T> input[kRowsPerThread] = {}, delta[kRowsPerThread] = {}, z[kRowsPerThread] = {};
    with_flag(packs && steps == kCudaTile, [&](auto whole) {
      main_input.template load<whole.value>(steps, 0, input);
      delta_input.template load<whole.value>(steps, 0, delta);
      if (gated) z_input.template load<whole.value>(steps, 0, z);
    });
    main_input.move(next);
    delta_input.move(next);
    z_input.move(next);
    with_flag(p.delta_softplus, [&](auto delta_softplus) {
#pragma unroll
      for (int k = 0; k < kRowsPerThread; ++k) {
        A dt[kPack], values[kPack], gate[kPack];
        widen(delta[k], dt);
        widen(input[k], values);
        if (gated) widen(z[k], gate);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          dt[j] = time_step(dt[j], bias[j], delta_softplus.value).value;
          if (!kBackward) values[j] *= dt[j];
          if (gated) values[j] *= silu(gate[j]);
        }
        store_pairs(dt, values, &memory.dt_and_input[block.row_of(k)][block.column]);
      }
    });
    for (int64_t first = 0; first < p.d_state; first += kStatesAtOnce<A>) {
      if (first > 0) __syncthreads();
      ChannelPack<T> weights[StatesInput<T, kChannels>::rounds] = {};
      with_flag(B_or_C.packs && steps == kCudaTile, [&](auto whole) {
        weights_input.template load<whole.value>(steps, first, weights);
      });
      weights_input.put(weights, &memory.weights[0][0]);
      __syncthreads();
      if (!held_at_once) {
        load_A_log2e(block, first, A_log2e);
        state.load(block, carry, first);
      }
      A sum[2] = {};
      const auto advance_to = [&](int step) {
        advance<kBackward>(block, memory, kBackward ? steps - 1 - step : step, A_log2e, state, sum);
      };
      for (int step = 0; step < steps;) {
        const int64_t time = begin + (kBackward ? steps - step : step);
        const int64_t boundary = sequences.first_from(kBackward ? time : time + 1);
        const int64_t first_of_s = sequences.begin(boundary - 1),
                      end_of_s = sequences.begin(boundary);
        if (time == (kBackward ? end_of_s : first_of_s)) load_first(boundary - 1, first);
        const int64_t rest = kBackward ? time - first_of_s : end_of_s - time;
        if (step == 0 && steps == kCudaTile && rest >= kCudaTile) {
          each_step<kUnrolled<A>>(advance_to);
          break;
        }
        const int stop = rest < steps - step ? step + int(rest) : steps;
#pragma unroll 1
        for (; step < stop; ++step) advance_to(step);
      }
      if (first == 0) {
        dt_sum[0] += sum[0];
        dt_sum[1] += sum[1];
      }
      if (!held_at_once) state.store(block, carry, first);
    }
    weights_input.move(next);
  }
  if (held_at_once) state.store(block, carry, 0);
  if (block.own < block.channels) {
    block.channel_row(p.carry_dt, chunk_row)[block.own] = block.half ? dt_sum[1] : dt_sum[0];
  }
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
