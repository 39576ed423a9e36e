// SPDX-License-Identifier: Apache-2.0
//
// The scan of long rows in parallel. h_t = a_t h_{t-1} + b_t is linear in h, so a chunk of time
// maps its carry-in, the state that enters it, to `decay * carry-in + local`, where the decay is
// exp(A sum dt) and `local` is the final state of the chunk-local scan, which begins with a state
// of 0. Two such maps compose to a third, so an associative scan over the chunks gives all
// carry-ins. The gradient in the other direction, x_t = a_t (x_{t+1} + C_t dy_t), is scanned
// likewise.
#include <cub/block/block_scan.cuh>

#include "common/cuda/state.cuh"
#include "selective_scan/cuda/states.cuh"

namespace mambablock {
namespace {

template <class T>
using CarryBlock = Block<T, kCudaForwardChannels, kCudaTile>;

template <bool kBackward>
using Params = std::conditional_t<kBackward, SelectiveScanBackward, SelectiveScanInputs>;

// What is scanned: u by B from initial_state, or dy by C from dfinal_state.
__device__ const InputView& scanned(const SelectiveScanInputs& p) { return p.u; }
__device__ const InputView& scanned(const SelectiveScanBackward& p) { return p.dy; }
__device__ const GroupedView& scanned_by(const SelectiveScanInputs& p) { return p.B; }
__device__ const GroupedView& scanned_by(const SelectiveScanBackward& p) { return p.C; }
__device__ const void* first_state(const SelectiveScanInputs& p) { return p.initial_state; }
__device__ const void* first_state(const SelectiveScanBackward& p) { return p.dfinal_state; }

template <class T>
struct Memory {
  using A = Accumulator<T>;
  PairTile<A, CarryBlock<T>> dt_and_input;  // dt, and dt * u or the gradient of y
  alignas(16) A B_or_C[kCudaTile][kStatesAtOnce<A>];
  alignas(
      16) A dt_sums[CarryBlock<T>::threads * kPack / kCudaForwardChannels][kCudaForwardChannels];
};

// A block's chunk-local scan.
template <class T, bool kBackward>
class ChunkLocalScan {
  using A = Accumulator<T>;
  using Block = CarryBlock<T>;
  static constexpr int64_t next = kBackward ? -kCudaTile : kCudaTile;
  static constexpr int rows = Block::rows, held = kStatesHeld<A>;

 public:
  __device__ ChunkLocalScan(const Params<kBackward>& p, const Block& block)
      : p(p),
        block(block),
        memory(*reinterpret_cast<Memory<T>*>(shared_memory())),
        pair_place(memory.dt_and_input.place(block.pair)),
        carry(block.channel_row(block.plan.carry, block.chunk_row(), p.d_state)),
        gated(kBackward && p.z.data != nullptr),
        one_slice(p.d_state <= kStatesAtOnce<A>),
        tiles((block.end - block.begin + kCudaTile - 1) / kCudaTile),
        begin(block.begin + (kBackward ? (tiles - 1) * kCudaTile : 0)),
        main_input(block, scanned(p), begin),
        delta_input(block, p.delta, begin),
        z_input(block, p.z, begin),
        B_or_C_input(block, scanned_by(p), begin),
        regular(block.is_full() && main_input.in_packs() && delta_input.in_packs() &&
                (!gated || z_input.in_packs()) && scanned_by(p).packs) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) bias[j] = block.parameter(p.delta_bias, block.column + j);
  }

  __device__ __forceinline__ void run() {
    for (int64_t first = 0; first < p.d_state; first += kStatesAtOnce<A>) {
      load_A_log2e(block, first, A_log2e);
      state.load(block, nullptr, first);
      if (!one_slice) state.store(block, carry, first);
    }
    load(block.steps_from(begin));
    for (int64_t tile = 0; tile < tiles; ++tile, begin += next) {
      const int steps = block.steps_from(begin);
      __syncthreads();  // all are done with the tile before
      put(steps);
      if (one_slice) B_or_C_input.put(B_or_C, &memory.B_or_C[0][0]);
      // In flight while the states advance.
      if (tile + 1 < tiles) load(block.steps_from(begin + next));
      for (int64_t first = 0; first < p.d_state; first += kStatesAtOnce<A>) {
        if (!one_slice) load_slice(steps, first);
        __syncthreads();
        advance_tile(steps, first);
        if (!one_slice) state.store(block, carry, first);
      }
      if (!one_slice) B_or_C_input.move(next);
    }
    if (one_slice) state.store(block, carry, 0);
    store_dt_sum();
  }

 private:
  // A tile's inputs, into registers.
  __device__ __forceinline__ void load(int steps) {
    with_flag(regular && steps == kCudaTile, [&](auto regular) {
      main_input.template load<regular.value>(steps, input);
      delta_input.template load<regular.value>(steps, delta);
      if (gated) z_input.template load<regular.value>(steps, z);
      if (one_slice) B_or_C_input.template load<regular.value>(steps, 0, B_or_C);
    });
    main_input.move(next);
    delta_input.move(next);
    z_input.move(next);
    if (one_slice) B_or_C_input.move(next);
  }

  __device__ __forceinline__ void load_slice(int steps, int64_t first) {
    if (first > 0) __syncthreads();  // all are done with the states before
    B_or_C_input.template load<false>(steps, first, B_or_C);
    B_or_C_input.put(B_or_C, &memory.B_or_C[0][0]);
    load_A_log2e(block, first, A_log2e);
    state.load(block, carry, first);
  }

  // What was loaded, into shared memory.
  __device__ __forceinline__ void put(int steps) {
    with_flag(p.delta_softplus, [&](auto delta_softplus) {
#pragma unroll
      for (int k = 0; k < rows; ++k) {
        A dt[kPack], values[kPack], gate[kPack];
        widen(delta[k], dt);
        widen(input[k], values);
        if (gated) widen(z[k], gate);
        const bool exists = block.row_of(k) < steps;
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          dt[j] = time_step(dt[j], bias[j], delta_softplus.value).value;
          if (exists) dt_sum[j] += dt[j];
          if (!kBackward) values[j] *= dt[j];
          if (gated) values[j] *= silu(gate[j]);
        }
        memory.dt_and_input.store(block.row_of(k), block.column, dt, values);
      }
    });
  }

  // A slice of the states through the tile.
  __device__ __forceinline__ void advance_tile(int steps, int64_t first) {
    const Sequences& sequences = block.sequences;
    for (int step = 0; step < steps;) {
      const int64_t time = begin + (kBackward ? steps - step : step);
      const int64_t boundary = sequences.first_from(kBackward ? time : time + 1);
      const int64_t first_of_s = sequences.begin(boundary - 1),
                    end_of_s = sequences.begin(boundary);
      // Where a sequence begins, in the direction of the scan.
      if (time == (kBackward ? end_of_s : first_of_s)) {
        state.load(block, sequence_row(block, first_state(p), boundary - 1), first);
      }
      const int64_t rest = kBackward ? time - first_of_s : end_of_s - time;
      if (step == 0 && steps == kCudaTile && rest >= kCudaTile) {
        [[maybe_unused]] constexpr int unrolled = sizeof(A) == 4 ? kCudaTile : 1;
#pragma unroll unrolled
        for (int i = 0; i < kCudaTile; ++i) advance(kBackward ? kCudaTile - 1 - i : i);
        return;
      }
      const int stop = rest < steps - step ? step + int(rest) : steps;
#pragma unroll 1
      for (; step < stop; ++step) advance(kBackward ? steps - 1 - step : step);
    }
  }

  __device__ __forceinline__ void advance(int step) {
    A B_or_C[held], at[4];  // dt and input of both channels
    load_vectors(memory.B_or_C[step] + block.part * held, B_or_C);
    memory.dt_and_input.load(step, pair_place, at);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const A dt = at[2 * k], input = at[2 * k + 1];
#pragma unroll
      for (int n = 0; n < held; ++n) {
        A& value = state.values[k][n];
        const A decay = exp2(dt * A_log2e.values[k][n]), added = input * B_or_C[n];
        value = kBackward ? decay * (value + added) : decay * value + added;
      }
    }
  }

  // The channels' sums of dt over the chunk.
  __device__ __forceinline__ void store_dt_sum() {
    store_vectors(dt_sum, &memory.dt_sums[block.row / rows][block.column]);
    __syncthreads();
    const int channel = threadIdx.x;
    if (channel >= block.channels) return;
    A total = 0;
    for (const auto& row : memory.dt_sums) total += row[channel];
    block.channel_row(block.plan.carry_dt, block.chunk_row())[channel] = total;
  }

  const Params<kBackward>& p;
  const Block& block;
  Memory<T>& memory;
  const int pair_place;
  A* carry;
  bool gated, one_slice;
  int64_t tiles, begin;
  TileInput<T, Block> main_input, delta_input, z_input;
  StatesInput<T, Block> B_or_C_input;
  bool regular;
  A bias[kPack], dt_sum[kPack] = {};
  States<A> A_log2e, state;
  Pack<T> input[rows] = {}, delta[rows] = {}, z[rows] = {},
          B_or_C[StatesInput<T, Block>::rounds] = {};
};

// The final states of the chunk-local scans into the plan's carry, and their sums of dt into
// carry_dt.
template <class T, bool kBackward>
__global__ void __launch_bounds__(CarryBlock<T>::threads, 1)
    chunk_local_kernel(const Params<kBackward> p, const ScanCudaPlan plan) {
  const CarryBlock<T> block(p, plan);
  // What leaves the row is no chunk's carry-in.
  if (block.chunk == (kBackward ? 0 : plan.chunks - 1)) return;
  ChunkLocalScan<T, kBackward>(p, block).run();
}

constexpr int kChunksAtOnce = 128;

// A chunk's map of the state, to 2^exponent * state + local: the decay by its exponent, since it
// may overflow where its product with the state does not. A chunk in which a sequence begins
// forgets the state, NaN included; its exponent is kForget.
template <class A>
struct ChunkMap {
  static constexpr A kForget = -std::numeric_limits<A>::infinity();
  A exponent, local;
};

struct Compose {
  template <class A>
  __device__ ChunkMap<A> operator()(const ChunkMap<A>& first, const ChunkMap<A>& second) const {
    const bool forgets = second.exponent == ChunkMap<A>::kForget;
    const A before = forgets ? A(0) : scaled(first.local, second.exponent);
    return {forgets ? ChunkMap<A>::kForget : first.exponent + second.exponent,
            before + second.local};
  }
};

// The map of all chunks that the block has scanned so far.
template <class A>
struct RunningMap {
  ChunkMap<A> map;
  __device__ ChunkMap<A> operator()(const ChunkMap<A>& block_map) {
    const ChunkMap<A> before = map;
    map = Compose()(before, block_map);
    return before;
  }
};

// Replaces the final states of the chunk-local scans, in the plan's carry, by the carry-ins. A
// block for each channel of each row of the batch, a thread for each chunk.
template <class A, bool kBackward>
__global__ void __launch_bounds__(kChunksAtOnce)
    carry_in_kernel(const SelectiveScanInputs p, const ScanCudaPlan plan) {
  using Scan = cub::BlockScan<ChunkMap<A>, kChunksAtOnce>;
  constexpr ChunkMap<A> forget{ChunkMap<A>::kForget, A(0)};
  auto& storage = *reinterpret_cast<typename Scan::TempStorage*>(shared_memory());
  const int64_t batch = blockIdx.x / p.channels, channel = blockIdx.x % p.channels;
  const Sequences sequences{plan.boundaries, p.sequences, p.length, plan.reverse};
  for (int64_t n = 0; n < p.d_state; ++n) {
    const A value = load_state<A>(p.A.dtype, p.A.data, channel * p.d_state + n);
    const A A_log2e = represented(p.A, value) * A(1.4426950408889634);
    RunningMap<A> running{forget};
    for (int64_t base = 0; base < plan.chunks; base += kChunksAtOnce) {
      const int64_t index = base + threadIdx.x;
      const int64_t chunk = kBackward ? plan.chunks - 1 - index : index;
      const int64_t row = (batch * plan.chunks + chunk) * p.channels + channel;
      A* carry = static_cast<A*>(plan.carry) + row * p.d_state + n;
      ChunkMap<A> map = forget;
      // What leaves the last chunk was not computed.
      if (index < plan.chunks - 1) {
        const int64_t begin = chunk * plan.chunk_steps;
        const int64_t end = min(begin + plan.chunk_steps, p.length);
        // The backward's state is replaced where a sequence ends, at the chunk's end included.
        const int64_t boundary = sequences.first_from(kBackward ? begin + 1 : begin);
        const bool forgets = sequences.begin(boundary) < (kBackward ? end + 1 : end);
        const A exponent = A_log2e * static_cast<const A*>(plan.carry_dt)[row];
        // A decay of 0 forgets no NaN.
        constexpr A lowest = A(-1e30);
        map = {forgets ? ChunkMap<A>::kForget : exponent < lowest ? lowest : exponent, *carry};
      }
      Scan(storage).ExclusiveScan(map, map, Compose(), running);
      __syncthreads();
      if (index < plan.chunks) *carry = map.local;
    }
  }
}

template <bool kBackward>
void carries(const char* op, const Params<kBackward>& p, const ScanCudaPlan& plan,
             cudaStream_t stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, chunk_local_kernel<T, kBackward>, cuda_blocks(p, plan, kCudaForwardChannels),
           CarryBlock<T>::threads, sizeof(Memory<T>), stream, p, plan);
  });
  const auto launch_carry_in = [&](auto zero) {
    using A = decltype(zero);
    using Storage = typename cub::BlockScan<ChunkMap<A>, kChunksAtOnce>::TempStorage;
    launch(op, carry_in_kernel<A, kBackward>, p.batch * p.channels, kChunksAtOnce, sizeof(Storage),
           stream, p, plan);
  };
  if (p.dtype == DType::float64) {
    launch_carry_in(double{});
  } else {
    launch_carry_in(float{});
  }
}

}  // namespace

void cuda_forward_carries(const char* op, const SelectiveScanInputs& p, const ScanCudaPlan& plan,
                          cudaStream_t stream) {
  carries<false>(op, p, plan, stream);
}

void cuda_backward_carries(const char* op, const SelectiveScanBackward& p, const ScanCudaPlan& plan,
                           cudaStream_t stream) {
  carries<true>(op, p, plan, stream);
}

}  // namespace mambablock
