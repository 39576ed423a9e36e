// SPDX-License-Identifier: Apache-2.0
#include "common/cuda/state.cuh"
#include "selective_state_update/cuda/kernels.h"

namespace mambablock {
namespace {

constexpr int kThreads = 128;
// Neighbouring threads that share a channel's states.
constexpr int kThreadsPerChannel = 8;

template <class T>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const SelectiveStateUpdateParams p, const int64_t* state_rows) {
  using A = Accumulator<T>;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t index = thread / kThreadsPerChannel;
  const bool exists = index < p.batch * p.channels;
  const int64_t b = exists ? index / p.channels : 0, c = exists ? index % p.channels : 0;
  const int64_t row = exists ? used_row(state_rows, p.rows, b) : -1;
  const auto input = [&](const InputView& tensor) {
    return A(
        to_accumulator(static_cast<const T*>(tensor.data)[b * tensor.batch + c * tensor.channel]));
  };
  const auto parameter = [&](const ParameterView& view) {
    return view.data == nullptr ? A(0) : parameter_at<T>(view, c);
  };
  A u = 0, sum = 0;
  if (row >= 0) {
    u = input(p.u);
    A dt = input(p.delta) + parameter(p.delta_bias);
    if (p.delta_softplus) dt = softplus(dt);
    const int64_t group = c / (p.channels / p.groups);
    const T* B = static_cast<const T*>(p.B.data) + b * p.B.batch + group * p.B.group;
    const T* C = static_cast<const T*>(p.C.data) + b * p.C.batch + group * p.C.group;
    const int64_t state = row * p.state_row + c * p.state_channel;
    for (int64_t n = threadIdx.x % kThreadsPerChannel; n < p.d_state; n += kThreadsPerChannel) {
      const A value = represented(p.A, parameter_at<T>(p.A, c * p.d_state + n));
      const A decay = exp2(value * (dt * A(1.4426950408889634)));
      const int64_t at = state + n * p.state_stride;
      const A h = decay * load_state<A>(p.state_dtype, p.state, at) +
                  to_accumulator(B[n * p.B.state]) * (dt * u);
      sum += h * to_accumulator(C[n * p.C.state]);
      store_state(p.state_dtype, p.state, at, h);
    }
  }
#pragma unroll
  for (int apart = kThreadsPerChannel / 2; apart > 0; apart /= 2) {
    sum += __shfl_xor_sync(0xffffffff, sum, apart);
  }
  if (!exists || threadIdx.x % kThreadsPerChannel != 0) return;
  A y = 0;
  if (row >= 0) {
    y = sum + parameter(p.D) * u;
    if (p.z.data != nullptr) y *= silu(input(p.z));
  }
  static_cast<T*>(p.y.data)[b * p.y.batch + c] = from_accumulator<T>(y);
}

}  // namespace

void cuda_update(const char* op, const SelectiveStateUpdateParams& p, const int64_t* state_rows,
                 cudaStream_t stream) {
  const int64_t threads = p.batch * p.channels * kThreadsPerChannel;
  dispatch_dtype(p.dtype, [&](auto type) {
    launch(op, update_kernel<decltype(type)>, (threads + kThreads - 1) / kThreads, kThreads, 0,
           stream, p, state_rows);
  });
}

}  // namespace mambablock
