// SPDX-License-Identifier: Apache-2.0
#include "common/cuda/sums.h"
#include "common/cuda/vectors.cuh"

namespace mambablock {
namespace {

constexpr int kThreads = 128;

template <class A, class T>
__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(const A* partials, int64_t count, int64_t size, T* total) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  A sum = 0;
#pragma unroll 8
  for (int64_t row = 0; row < count; ++row) sum += partials[row * size + i];
  total[i] = from_accumulator<T>(Accumulator<T>(sum));
}

}  // namespace

void sum_rows(const char* op, DType partials_dtype, DType total_dtype, const void* partials,
              int64_t count, int64_t size, void* total, cudaStream_t stream) {
  const auto launch_kernel = [&](auto partial, auto type) {
    using A = decltype(partial);
    using T = decltype(type);
    launch(op, sum_rows_kernel<A, T>, (size + kThreads - 1) / kThreads, kThreads, 0, stream,
           static_cast<const A*>(partials), count, size, static_cast<T*>(total));
  };
  if (partials_dtype == DType::float32) {
    dispatch_dtype(total_dtype, [&](auto type) {
      if constexpr (!std::is_same_v<decltype(type), double>) launch_kernel(float{}, type);
    });
  } else if (total_dtype == DType::float64) {
    launch_kernel(double{}, double{});
  } else {
    launch_kernel(double{}, float{});
  }
}

}  // namespace mambablock
