// SPDX-License-Identifier: Apache-2.0
//
// Holds the emulation itself: right kernels run right, and each kind of wrong one is caught. Under
// the address sanitizer there is no race detector, and races show in results alone.
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/warp/warp_reduce.cuh>
#include <cub/warp/warp_scan.cuh>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace {

constexpr unsigned kThreads = 96, kBlocks = 5, kAll = 0xffffffffu;

int failures = 0;

void expect(bool right, const std::string& what) {
  if (right) return;
  printf("failed: %s\n", what.c_str());
  ++failures;
}

template <class... Parameters>
cudaError_t launch(dim3 grid, dim3 block, size_t shared, void (*kernel)(Parameters...),
                   Parameters... arguments) {
  const cudaLaunchConfig_t config{grid, block, shared};
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class T>
T* shared() {
  return static_cast<T*>(mambablock_emulation::shared_memory());
}

// The message of the error that a kernel ends in, or nothing.
template <class Kernel>
std::string error_of(Kernel kernel, unsigned threads = kThreads) {
  try {
    launch(dim3(2), dim3(threads), kThreads * sizeof(float), +kernel);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void expect_error(const std::string& got, std::initializer_list<const char*> parts) {
  for (const char* part : parts) {
    expect(got.find(part) != std::string::npos, std::string(part) + " in \"" + got + "\"");
  }
}

// Each block mirrors its tiles through shared memory.
template <bool SYNC_BEFORE_READ, bool SYNC_BEFORE_WRITE>
__global__ void __launch_bounds__(kThreads) mirror(const float* input, float* output, int tiles) {
  float* tile = shared<float>();
  for (int i = 0; i < tiles; ++i) {
    const int first = (blockIdx.x * tiles + i) * kThreads;
    if (SYNC_BEFORE_WRITE) __syncthreads();
    tile[threadIdx.x] = input[first + threadIdx.x];
    if (SYNC_BEFORE_READ) __syncthreads();
    output[first + threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
  }
}

template <bool SYNC_BEFORE_READ, bool SYNC_BEFORE_WRITE>
bool mirrors() {
  const int tiles = 3, count = kBlocks * tiles * kThreads;
  std::vector<float> input(count), output(count);
  for (int i = 0; i < count; ++i) input[i] = float(i);
  launch(dim3(kBlocks), dim3(kThreads), kThreads * sizeof(float),
         mirror<SYNC_BEFORE_READ, SYNC_BEFORE_WRITE>, (const float*)input.data(), output.data(),
         tiles);
  bool right = true;
  for (int i = 0; i < count; ++i) {
    right = right && output[i] == float(i / kThreads * kThreads + kThreads - 1 - i % kThreads);
  }
  return right;
}

#if !defined(__SANITIZE_THREAD__)
__global__ void poisoned(float* output) {
  output[threadIdx.x] = shared<float>()[threadIdx.x];
  shared<float>()[threadIdx.x] = 1;
}
#endif

__global__ void shuffles(double* sums, int* others) {
  const int rank = int(threadIdx.x + blockDim.x * threadIdx.y);
  double sum = rank;
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAll, sum, lanes);
  sums[rank] = sum;
  others[4 * rank] = __shfl_up_sync(kAll, rank, 3, 8);
  others[4 * rank + 1] = __shfl_down_sync(kAll, rank, 3, 8);
  others[4 * rank + 2] = __shfl_sync(kAll, rank, 9, 8);
  // The halves of a warp are at different operations, each with its own mask.
  const unsigned half = rank % 32 < 16 ? 0xffffu : 0xffff0000u;
  if (rank % 32 < 16) {
    others[4 * rank + 3] = int(__ballot_sync(half, rank % 2));
  } else {
    others[4 * rank + 3] = __any_sync(half, rank % 32 == 20) + 2 * __all_sync(half, rank % 2);
  }
}

void test_shuffles() {
  std::vector<double> sums(kThreads);
  std::vector<int> others(4 * kThreads);
  launch(dim3(1), dim3(kThreads / 3, 3), 0, shuffles, sums.data(), others.data());
  for (int i = 0; i < int(kThreads); ++i) {
    const int segment = i / 8 * 8;
    expect(sums[i] == 32 * (i / 32 * 32) + 31 * 16, "sum by shuffles");
    expect(others[4 * i] == (i - 3 < segment ? i : i - 3), "__shfl_up_sync");
    expect(others[4 * i + 1] == (i + 3 > segment + 7 ? i : i + 3), "__shfl_down_sync");
    expect(others[4 * i + 2] == segment + 1, "__shfl_sync");
    expect(others[4 * i + 3] == (i % 32 < 16 ? 0xaaaa : 1), "votes");
  }
}

struct Decay {
  float factor, value;
};

struct Compose {
  __device__ Decay operator()(const Decay& a, const Decay& b) const {
    return {a.factor * b.factor, b.factor * a.value + b.value};
  }
};

struct Carry {
  Decay running;
  __device__ Decay operator()(const Decay& block) {
    const Decay before = running;
    running = Compose()(running, block);
    return before;
  }
};

__global__ void collectives(Decay* steps, float* total, int tiles) {
  using Scan = cub::BlockScan<Decay, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  using Reduce = cub::BlockReduce<float, kThreads>;
  auto& scan = *shared<Scan::TempStorage>();
  Carry carry{{1, 0}};
  float sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    Decay items[2] = {steps[(tile * kThreads + threadIdx.x) * 2],
                      steps[(tile * kThreads + threadIdx.x) * 2 + 1]};
    Scan(scan).InclusiveScan(items, items, Compose(), carry);
    for (int i = 0; i < 2; ++i) {
      steps[(tile * kThreads + threadIdx.x) * 2 + i] = items[i];
      sum += items[i].value;
    }
    __syncthreads();
  }
  const float all = Reduce(*shared<Reduce::TempStorage>()).Sum(sum);
  if (threadIdx.x == 0) *total = all;
  auto* segments = shared<cub::WarpScan<int, 8>::TempStorage>();
  __syncthreads();
  int before, segment;
  cub::WarpScan<int, 8>(segments[threadIdx.x / 8]).ExclusiveScan(1, before, 0, cub::Sum(), segment);
  if (before != int(threadIdx.x % 8) || segment != 8) *total = NAN;
}

void test_collectives() {
  const int tiles = 3, count = tiles * 2 * kThreads;
  std::vector<Decay> steps(count);
  for (int i = 0; i < count; ++i) steps[i] = {0.5f + 0.01f * float(i % 40), float(i % 7)};
  std::vector<float> expected(count);
  float state = 0, sum = 0, total = NAN;
  for (int i = 0; i < count; ++i) {
    expected[i] = state = steps[i].factor * state + steps[i].value;
    sum += state;
  }
  launch(dim3(1), dim3(kThreads), kThreads * sizeof(Decay) + sizeof(Decay), collectives,
         steps.data(), &total, tiles);
  for (int i = 0; i < count; ++i) {
    expect(std::abs(steps[i].value - expected[i]) < 1e-3f, "cub::BlockScan");
  }
  expect(std::abs(total - sum) < 1e-4f * sum, "cub::BlockReduce and cub::WarpScan");
}

void test_divergence() {
  expect_error(error_of([] {
                 if (threadIdx.x != 7) __syncthreads();
               }),
               {"95 from thread 0 on at __syncthreads at ",
                "self_test.cpp:", "1 from thread 7 on have returned"});
  expect_error(error_of([] {
                 if (threadIdx.x < 32) {
                   __syncthreads();
                 } else {
                   __syncthreads();
                 }
               }),
               {"32 from thread 0 on at __syncthreads", "64 from thread 32 on at __syncthreads"});
  expect_error(error_of([] {
                 if (threadIdx.x % 2 == 0) {
                   __shfl_xor_sync(kAll, 1, 2);
                 } else {
                   __shfl_xor_sync(kAll, 1, 4);
                 }
               }),
               {"wait for each other", "at __shfl_xor_sync with mask 0xffffffff at "});
  expect_error(error_of([] {
                 if (threadIdx.x == 3) return;
                 __syncwarp();
               }),
               {"__syncwarp", "mask"});
  expect_error(error_of([] {
                 if (threadIdx.x < 16) __shfl_down_sync(0xffu, 1.0f, 1);
               }),
               {"__shfl_down_sync with a mask that lacks the calling lane"});
  expect_error(error_of([] { __shfl_sync(kAll, 1.0f, 0); }, 80),
               {"__shfl_sync with a mask of lanes that the block does not have"});
  expect_error(error_of([] {
                 if (threadIdx.x < 16) __shfl_xor_sync(0xffffu, 1.0, 16);
               }),
               {"lane 0 reads lane 16, which is not in the mask, in __shfl_xor_sync"});
}

#if defined(__SANITIZE_THREAD__)
float across_blocks[2 * kThreads];

// Reads its neighbour's value of the tile before, while the next one goes to the other buffer.
template <bool RIGHT>
void double_buffered() {
  float* buffers = shared<float>();
  constexpr int half = kThreads / 2;
  if (threadIdx.x >= half) return;
  buffers[threadIdx.x] = 0;
  for (int tile = 1; tile < 4; ++tile) {
    __syncthreads();
    const float read = buffers[(tile - 1) % 2 * half + (threadIdx.x + 32) % half];
    buffers[(RIGHT ? tile % 2 : (tile - 1) % 2) * half + threadIdx.x] = read + 1;
  }
}

void test_races() {
  const auto mirrored = [](auto before_read, auto before_write) {
    try {
      return mirrors<before_read.value, before_write.value>() ? std::string() : "other values";
    } catch (const std::runtime_error& error) {
      return std::string(error.what());
    }
  };
  const std::true_type yes;
  const std::false_type no;
  expect_error(mirrored(no, yes), {"a race: it ", "of shared memory"});
  expect_error(mirrored(yes, no), {"a race: it ", "of shared memory"});
  expect(mirrored(yes, yes).empty(), "no race where there are both barriers");

  const auto through_warp = [](auto synced) {
    return error_of([] {
      float* values = shared<float>();
      values[threadIdx.x] = 1;
      if (decltype(synced)::value) __syncwarp();
      // A shuffle orders no memory.
      __shfl_xor_sync(kAll, 1.0f, 1);
      if (values[threadIdx.x ^ 1] != 1) __syncthreads();
    });
  };
  expect_error(through_warp(no), {"a race: it reads 4 bytes of shared memory"});
  expect(through_warp(yes).empty(), "__syncwarp orders the accesses of a warp");

  expect_error(error_of(double_buffered<false>, kThreads / 2), {"a race: it ", "of shared memory"});
  expect(error_of(double_buffered<true>, kThreads / 2).empty(), "a double buffer is no race");

  const auto blocks = [](auto apart) {
    return error_of([] {
      across_blocks[(decltype(apart)::value ? blockIdx.x * kThreads : 0) + threadIdx.x] = 1;
    });
  };
  expect_error(blocks(no), {"a race: it writes 4 bytes of memory, which another block"});
  expect(blocks(yes).empty(), "blocks that write apart are no race");
  expect_error(error_of([] {
                 if (threadIdx.x == 0 && blockIdx.x == 0) across_blocks[0] = 1;
                 if (blockIdx.x == 1 && across_blocks[0] == 2) across_blocks[1] = 1;
               }),
               {"a race: it ", " of memory, which another block of the launch "});

  expect_error(error_of([] {
                 if (threadIdx.x % 32 < 31) __shfl_xor_sync(kAll, 1.0f, 1);
               }),
               {"__shfl_xor_sync"});

  // What another block wrote is none of this one's.
  expect_error(error_of([] {
                 float& value = shared<float>()[threadIdx.x];
                 if (blockIdx.x == 0) value = 0;
                 if (blockIdx.x == 1 && value == 1) value = 2;
               }),
               {"a race: it reads 4 bytes of shared memory", "which no thread of the block wrote"});
  expect_error(error_of([] {
                 if (threadIdx.x % 2 == 0) shared<float>()[threadIdx.x] = 0;
                 __syncthreads();
                 if (shared<float>()[threadIdx.x] == 1) __syncthreads();
               }),
               {"a race: it reads 4 bytes of shared memory", "which no thread of the block wrote"});
}
#endif

__global__ void nothing() {}

void test_launches() {
  const auto refuses = [](dim3 grid, dim3 block, size_t bytes) {
    return launch(grid, block, bytes, nothing) != cudaSuccess && cudaGetLastError() != cudaSuccess;
  };
  expect(refuses(dim3(0), dim3(32), 0), "a launch of no blocks is refused");
  expect(refuses(dim3(1, 65536), dim3(32), 0), "65,536 blocks along y are refused");
  expect(refuses(dim3(1), dim3(32, 33), 0), "a block of 1056 threads is refused");
  expect(refuses(dim3(1), dim3(32), 50000), "shared memory that was not opted in to is refused");
  expect(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 50000) ==
             cudaSuccess,
         "opting in to 50,000 bytes");
  expect(!refuses(dim3(2, 2, 2), dim3(4, 4, 4), 50000), "shared memory after opting in");
  expect(cudaGetLastError() == cudaSuccess, "no error stays");
  setenv("MAMBABLOCK_EMULATION_MULTIPROCESSORS", "132", 1);
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0);
  expect(count == 132, "the variable sets how many multiprocessors there are");
}

#if defined(__SANITIZE_ADDRESS__)
void test_overrun() {
  const pid_t child = fork();
  if (child == 0) {
    close(2);
    error_of([] { shared<float>()[threadIdx.x + 1] = 0; });
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  expect(!WIFEXITED(status) || WEXITSTATUS(status) != 0,
         "the address sanitizer sees a step outside of shared memory");
}
#endif

}  // namespace

int main() {
  for (const char* seed : {"0", "1", "2", "3", "4"}) {
    setenv("MAMBABLOCK_EMULATION_SEED", seed, 1);
    expect((mirrors<true, true>()), "tiles mirrored through shared memory");
#if defined(__SANITIZE_THREAD__)
    test_races();
#else
    expect(!(mirrors<false, true>()), "a missing __syncthreads before reading shows");
    expect(!(mirrors<true, false>()), "a missing __syncthreads before writing shows");
#endif
    test_shuffles();
    test_collectives();
    test_divergence();
  }
#if !defined(__SANITIZE_THREAD__)
  std::vector<float> seen(kThreads);
  launch(dim3(kBlocks), dim3(kThreads), kThreads * sizeof(float), poisoned, seen.data());
  for (const float value : seen) expect(std::isnan(value), "shared memory is NaN at first");
#endif
  test_launches();
#if defined(__SANITIZE_ADDRESS__)
  test_overrun();
#endif
  printf("%s\n", failures == 0 ? "all is as it should be" : "failed");
  return failures != 0;
}
