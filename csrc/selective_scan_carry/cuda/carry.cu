// SPDX-License-Identifier: Apache-2.0
//
// Each chunk of time is scanned from a state of 0, then one thread a channel goes through the
// chunks' final states. The backward is the same from the last step to the first: in its kernels
// time is mirrored.
#include "common/cuda/sequences.cuh"
#include "common/cuda/state.cuh"
#include "selective_scan_carry/cuda/kernels.h"

namespace mambablock {
namespace {

template <class A>
inline constexpr int kStatesHeld = sizeof(A) == 8 ? 8 : 16;

template <bool kBackward>
struct Along {
  __device__ Along(const SelectiveScanCarry& p, const CarryCudaPlan& plan)
      : sequences{plan.boundaries, p.sequences, p.length, plan.reverse} {}

  __device__ int64_t begin(int64_t s) const {
    return kBackward ? sequences.length - sequences.begin(sequences.count - s) : sequences.begin(s);
  }
  // The last sequence that begins at `time` or before.
  __device__ int64_t last_begun(int64_t time) const {
    int64_t low = 0, high = sequences.count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (begin(middle) <= time) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low - 1;
  }
  __device__ int64_t state_row(int64_t batch, int64_t s) const {
    return sequences.state_row(batch, kBackward ? sequences.count - 1 - s : s);
  }
  __device__ int64_t step(int64_t time) const {
    return kBackward ? sequences.length - 1 - time : time;
  }

  Sequences sequences;
};

template <class T, bool kBackward>
__device__ __forceinline__ void scan_chunk(const SelectiveScanCarry& p, const CarryCudaPlan& plan) {
  using A = Accumulator<T>;
  constexpr int held = kStatesHeld<A>;
  const int64_t blocks = (p.channels + kCarryChannels - 1) / kCarryChannels;
  const int64_t d = blockIdx.x % blocks * kCarryChannels + threadIdx.x;
  const int64_t chunk = blockIdx.x / blocks % plan.chunks;
  const int64_t batch = blockIdx.x / blocks / plan.chunks;
  if (d >= p.channels) return;
  const Along<kBackward> along(p, plan);
  const int64_t begin = min(chunk * plan.chunk_steps, p.length);
  const int64_t end = min(begin + plan.chunk_steps, p.length);
  const auto* input = static_cast<const T*>(p.u.data) + batch * p.u.batch + d * p.u.channel;
  const auto* delta =
      static_cast<const T*>(p.delta.data) + batch * p.delta.batch + d * p.delta.channel;
  const auto* z = static_cast<const T*>(p.z.data) + batch * p.z.batch + d * p.z.channel;
  const auto* B_or_C =
      static_cast<const T*>(p.B.data) + batch * p.B.batch + d / p.group_channels * p.B.group;
  const bool gated = kBackward && p.z.data != nullptr;
  const A bias = p.delta_bias.data == nullptr ? A(0) : parameter_at<T>(p.delta_bias, d);
  auto* final_dt = static_cast<A*>(p.dt_sum);
  auto* final_state = static_cast<A*>(p.state);
  for (int64_t first = 0; first < p.d_state; first += held) {
    const int64_t states = min(p.d_state - first, int64_t(held));
    A A_log2e[held], h[held], dt_sum = 0;
#pragma unroll
    for (int n = 0; n < held; ++n) {
      const A value = n < states ? parameter_at<T>(p.A, d * p.d_state + first + n) : A(0);
      A_log2e[n] = value * A(1.4426950408889634);
      h[n] = 0;
    }
    const auto store = [&](A* state, A* dt, int64_t row) {
#pragma unroll
      for (int n = 0; n < held; ++n) {
        if (n < states) state[(row * p.channels + d) * p.d_state + first + n] = h[n];
      }
      if (first == 0) dt[row * p.channels + d] = dt_sum;
    };
    // Leaves the sequences that end at `time`, from s on, for the one that goes on.
    const auto leave = [&](int64_t s, int64_t time) {
      for (; s < p.sequences && along.begin(s + 1) == time; ++s) {
        store(final_state, final_dt, along.state_row(batch, s));
#pragma unroll
        for (int n = 0; n < held; ++n) h[n] = 0;
        dt_sum = 0;
      }
      return s;
    };
    int64_t s = along.last_begun(begin);
    if (begin == 0) s = leave(0, 0);
    for (int64_t time = begin; time < end;) {
      const int64_t stop = min(along.begin(s + 1), end);
      for (; time < stop; ++time) {
        const int64_t step = along.step(time);
        const A biased = to_accumulator(delta[step * p.delta.time]) + bias;
        const A dt = p.delta_softplus ? softplus(biased) : biased;
        A entering = to_accumulator(input[step * p.u.time]);
        if (!kBackward) entering *= dt;
        if (gated) entering *= silu(A(to_accumulator(z[step * p.z.time])));
        dt_sum += dt;
#pragma unroll
        for (int n = 0; n < held; ++n) {
          if (n < states) {
            const A by = to_accumulator(B_or_C[step * p.B.time + (first + n) * p.B.state]);
            const A decay = exp2(dt * A_log2e[n]);
            h[n] = kBackward ? decay * (h[n] + entering * by) : decay * h[n] + entering * by;
          }
        }
      }
      s = leave(s, time);
    }
    store(static_cast<A*>(plan.state), static_cast<A*>(plan.dt_sum), batch * plan.chunks + chunk);
  }
}

template <class T>
__global__ void __launch_bounds__(kCarryChannels)
    chunk_kernel(const SelectiveScanCarry p, const CarryCudaPlan plan) {
  with_flag(plan.backward, [&](auto backward) { scan_chunk<T, backward.value>(p, plan); });
}

// Adds what comes from earlier chunks to the final states of the sequences that go through them.
template <class A, bool kBackward>
__device__ __forceinline__ void compose(const SelectiveScanCarry& p, const CarryCudaPlan& plan) {
  const int64_t index = int64_t(blockIdx.x) * kCarryChannels + threadIdx.x;
  if (index >= p.batch * p.channels) return;
  const int64_t batch = index / p.channels, d = index % p.channels;
  const Along<kBackward> along(p, plan);
  const auto* chunk_state = static_cast<const A*>(plan.state);
  const auto* chunk_dt = static_cast<const A*>(plan.dt_sum);
  auto* final_state = static_cast<A*>(p.state);
  auto* final_dt = static_cast<A*>(p.dt_sum);
  for (int64_t n = p.d_state - 1; n >= 0; --n) {
    const A value = load_state<A>(p.A.dtype, p.A.data, d * p.d_state + n);
    const A A_log2e = value * A(1.4426950408889634);
    A h = 0, sum = 0;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t begin = chunk * plan.chunk_steps;
      if (begin >= p.length) break;
      const int64_t end = min(begin + plan.chunk_steps, p.length);
      const int64_t row = (batch * plan.chunks + chunk) * p.channels + d;
      const int64_t s = along.last_begun(begin);
      if (along.begin(s) < begin && along.begin(s + 1) <= end) {
        const int64_t at = along.state_row(batch, s) * p.channels + d;
        const A dt = final_dt[at];
        final_state[at * p.d_state + n] += scaled(h, A_log2e * dt);
        if (n == 0) final_dt[at] = sum + dt;
      }
      const A state = chunk_state[row * p.d_state + n], dt = chunk_dt[row];
      const bool forgets = along.begin(along.last_begun(end - 1)) >= begin;
      h = forgets ? state : scaled(h, A_log2e * dt) + state;
      sum = forgets ? dt : sum + dt;
    }
  }
}

template <class A>
__global__ void __launch_bounds__(kCarryChannels)
    compose_kernel(const SelectiveScanCarry p, const CarryCudaPlan plan) {
  with_flag(plan.backward, [&](auto backward) { compose<A, backward.value>(p, plan); });
}

}  // namespace

void cuda_carry(const char* op, const SelectiveScanCarry& p, const CarryCudaPlan& plan,
                cudaStream_t stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    launch(op, chunk_kernel<decltype(type)>, cuda_carry_blocks(p) * plan.chunks, kCarryChannels, 0,
           stream, p, plan);
  });
  if (plan.chunks == 1) return;
  const int64_t blocks = (p.batch * p.channels + kCarryChannels - 1) / kCarryChannels;
  launch(op, p.dtype == DType::float64 ? compose_kernel<double> : compose_kernel<float>, blocks,
         kCarryChannels, 0, stream, p, plan);
}

}  // namespace mambablock
