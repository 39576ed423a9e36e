// SPDX-License-Identifier: Apache-2.0
#include <cub/block/block_scan.cuh>

#include "common/cuda/boundaries.h"
#include "common/cuda/vectors.cuh"

namespace mambablock {
namespace {

constexpr int kThreads = 256;

struct Max {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return a > b ? a : b; }
};

// The maximum of all that the block has scanned so far.
struct RunningMax {
  int64_t value;
  __device__ int64_t operator()(int64_t block_maximum) {
    const int64_t before = value;
    value = Max()(value, block_maximum);
    return before;
  }
};

template <class Index>
__global__ void __launch_bounds__(kThreads)
    boundaries_kernel(const Index* cu_seqlens, int64_t stride, int64_t count, int64_t length,
                      bool reverse, int64_t* boundaries) {
  using Scan = cub::BlockScan<int64_t, kThreads>;
  auto& storage = *reinterpret_cast<typename Scan::TempStorage*>(shared_memory());
  RunningMax running{0};
  for (int64_t first = 0; first <= count; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    int64_t value = i <= count ? int64_t(cu_seqlens[i * stride]) : 0;
    if (i == 0) value = 0;
    if (i == count || value > length) value = length;
    Scan(storage).InclusiveScan(value, value, Max(), running);
    __syncthreads();
    if (i > count) continue;
    boundaries[reverse ? count - i : i] = reverse ? length - value : value;
  }
}

}  // namespace

template <class Index>
void write_boundaries(const char* op, const Index* cu_seqlens, int64_t stride, int64_t count,
                      int64_t length, bool reverse, int64_t* boundaries, cudaStream_t stream) {
  constexpr size_t shared = sizeof(typename cub::BlockScan<int64_t, kThreads>::TempStorage);
  launch(op, boundaries_kernel<Index>, 1, kThreads, shared, stream, cu_seqlens, stride, count,
         length, reverse, boundaries);
}

template void write_boundaries(const char*, const int32_t*, int64_t, int64_t, int64_t, bool,
                               int64_t*, cudaStream_t);
template void write_boundaries(const char*, const int64_t*, int64_t, int64_t, int64_t, bool,
                               int64_t*, cudaStream_t);

}  // namespace mambablock
