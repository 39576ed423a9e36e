// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <stdexcept>
#include <string>

namespace mambablock {

// The block's dynamic shared memory.
__device__ inline unsigned char* shared_memory() {
#if defined(MAMBABLOCK_EMULATION)
  return static_cast<unsigned char*>(mambablock_emulation::shared_memory());
#else
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
#endif
}

inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA must run the kernel; got \"" +
                             cudaGetErrorString(error) + "\"");
  }
}

// Launches kernel(args...) on `blocks` blocks, if any.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads,
            size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string(op) + ": blocks must be at most 2147483647; got " +
                             std::to_string(blocks));
  }
  constexpr size_t without_opt_in = 48 * 1024;
  if (shared_bytes > without_opt_in) {
    const auto set = [&](cudaFuncAttribute attribute, int value) {
      check_cuda(op, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value));
    };
    set(cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    // All of it for shared memory, in percent, so that several blocks fit on a multiprocessor.
    set(cudaFuncAttributePreferredSharedMemoryCarveout, 100);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check_cuda(op, cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace mambablock
