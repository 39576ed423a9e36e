// SPDX-License-Identifier: Apache-2.0
#include "common/cuda/sums.h"
#include "common/cuda/device.cuh"

namespace mambablock {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(const Accumulator<T>* partials, int64_t count, int64_t size, T* total) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  Accumulator<T> sum = 0;
#pragma unroll 8
  for (int64_t row = 0; row < count; ++row) sum += partials[row * size + i];
  total[i] = from_accumulator<T>(sum);
}

}  // namespace

void sum_rows(const char* op, DType dtype, const void* partials, int64_t count, int64_t size,
              void* total, cudaStream_t stream) {
  dispatch_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, sum_rows_kernel<T>, (size + kThreads - 1) / kThreads, kThreads, 0, stream,
           static_cast<const Accumulator<T>*>(partials), count, size, static_cast<T*>(total));
  });
}

}  // namespace mambablock
