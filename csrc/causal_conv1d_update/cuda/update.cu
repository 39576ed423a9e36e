// SPDX-License-Identifier: Apache-2.0
#include "causal_conv1d_update/cuda/kernels.h"
#include "common/cuda/state.cuh"

namespace mambablock {
namespace {

constexpr int kThreads = 128;

// A thread for each channel of each row of the batch.
template <class T>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const CausalConv1dUpdateParams p, const int64_t* state_rows) {
  using A = Accumulator<T>;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.batch * p.channels) return;
  const int64_t b = index / p.channels, c = index % p.channels;
  T& y = static_cast<T*>(p.y.data)[b * p.y.batch + c];
  const int64_t row = used_row(state_rows, p.rows, b);
  if (row < 0) {
    y = from_accumulator<T>(A(0));
    return;
  }
  const int64_t taps = c * p.width;
  const auto weight = [&](int64_t tap) { return parameter_at<T>(p.weight, taps + tap); };
  const A x = to_accumulator(static_cast<const T*>(p.x.data)[b * p.x.batch + c * p.x.channel]);
  int64_t at = row * p.state_row + c * p.state_channel;
  A sum = p.bias.data == nullptr ? A(0) : parameter_at<T>(p.bias, c);
  for (int64_t tap = 0; tap + 1 < p.width; ++tap, at += p.state_step) {
    sum += weight(tap) * load_state<A>(p.state_dtype, p.state, at);
    const A next = tap + 2 < p.width ? load_state<A>(p.state_dtype, p.state, at + p.state_step) : x;
    store_state(p.state_dtype, p.state, at, next);
  }
  sum += weight(p.width - 1) * x;
  y = from_accumulator<T>(p.silu ? silu(sum) : sum);
}

}  // namespace

void cuda_update(const char* op, const CausalConv1dUpdateParams& p, const int64_t* state_rows,
                 cudaStream_t stream) {
  const int64_t blocks = (p.batch * p.channels + kThreads - 1) / kThreads;
  dispatch_dtype(p.dtype, [&](auto type) {
    launch(op, update_kernel<decltype(type)>, blocks, kThreads, 0, stream, p, state_rows);
  });
}

}  // namespace mambablock
