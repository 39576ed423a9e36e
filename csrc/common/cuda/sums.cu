// SPDX-License-Identifier: Apache-2.0
#include "common/cuda/state.cuh"
#include "common/cuda/sums.h"

namespace mambablock {
namespace {

// A block sums a warp's width of columns, its warps each every kRowsAtOnce-th row.
constexpr int kColumns = 32, kRowsAtOnce = 8;

struct Jobs {
  RowSums sums[kMostRowSums];
  int64_t blocks[kMostRowSums];
};

template <class A>
__global__ void __launch_bounds__(kColumns* kRowsAtOnce) sum_rows_kernel(const Jobs jobs) {
  auto& sums_of_rows = *reinterpret_cast<A(*)[kRowsAtOnce][kColumns]>(shared_memory());
  int64_t block = blockIdx.x;
  int job = 0;
  while (block >= jobs.blocks[job]) block -= jobs.blocks[job++];
  const RowSums& sums = jobs.sums[job];
  const int column = threadIdx.x % kColumns, first = threadIdx.x / kColumns;
  const int64_t i = block * kColumns + column;
  const A* partials = static_cast<const A*>(sums.partials) + i;
  A sum = 0;
  if (i < sums.size) {
#pragma unroll 4
    for (int64_t row = first; row < sums.count; row += kRowsAtOnce) {
      sum += partials[row * sums.size];
    }
  }
  sums_of_rows[first][column] = sum;
  __syncthreads();
  if (first != 0 || i >= sums.size) return;
#pragma unroll
  for (int row = 1; row < kRowsAtOnce; ++row) sum += sums_of_rows[row][column];
  if (sums.factor.data != nullptr) {
    sum *= represented(sums.factor, load_state<A>(sums.factor.dtype, sums.factor.data, i));
  }
  store_state<A>(sums.total_dtype, sums.total, i, sum);
}

}  // namespace

void sum_rows(const char* op, DType partials_dtype, const RowSums* sums, int count,
              cudaStream_t stream) {
  Jobs jobs{};
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    jobs.sums[i] = sums[i];
    jobs.blocks[i] = (sums[i].size + kColumns - 1) / kColumns;
    blocks += jobs.blocks[i];
  }
  const auto launch_kernel = [&](auto zero) {
    using A = decltype(zero);
    launch(op, sum_rows_kernel<A>, blocks, kColumns * kRowsAtOnce,
           sizeof(A) * kColumns * kRowsAtOnce, stream, jobs);
  };
  if (partials_dtype == DType::float64) {
    launch_kernel(double{});
  } else {
    launch_kernel(float{});
  }
}

}  // namespace mambablock
