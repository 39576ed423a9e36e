// SPDX-License-Identifier: Apache-2.0
//
// Stands in for CUDA's header, so that a .cu file compiles for the host: the part of the language
// and of the runtime that the kernels use.
#pragma once

#include <math.h>
#include <string.h>

#include <initializer_list>
#include <tuple>

#include "emulation/intrinsics.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ the_emulation_has_dynamic_shared_memory_alone

#define CUDART_VERSION 13000

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
};

enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };

struct cudaLaunchAttribute;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);

// What MAMBABLOCK_EMULATION_DRIVER says, by default as CUDART_VERSION.
cudaError_t cudaDriverGetVersion(int* version);

// MAMBABLOCK_EMULATION_MULTIPROCESSORS and MAMBABLOCK_EMULATION_SHARED_MEMORY, the most bytes that
// a block may opt in to, are read at each call.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  memset(memory, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}

namespace mambablock_emulation {

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);

// What a launch of this kernel would be refused for; the last error too.
cudaError_t check_launch(const void* kernel, const cudaLaunchConfig_t& config);

struct Parameter {
  const void* data;
  size_t size, alignment;
};

// Where MAMBABLOCK_EMULATION_RECORD names a file: adds the launch to it as a line of JSON.
bool record_launch(const void* kernel, const cudaLaunchConfig_t& config,
                   std::initializer_list<Parameter> parameters);

}  // namespace mambablock_emulation

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return mambablock_emulation::set_attribute(reinterpret_cast<const void*>(kernel), attribute,
                                             value);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const cudaError_t error =
      mambablock_emulation::check_launch(reinterpret_cast<const void*>(kernel), *config);
  if (error != cudaSuccess) return error;
  const std::tuple<Parameters...> parameters(arguments...);
  const bool recorded = std::apply(
      [&](const auto&... values) {
        return mambablock_emulation::record_launch(
            reinterpret_cast<const void*>(kernel), *config,
            {mambablock_emulation::Parameter{&values, sizeof(values),
                                             alignof(decltype(values))}...});
      },
      parameters);
  if (recorded) return cudaSuccess;
  auto thread = [&] { std::apply(kernel, parameters); };
  mambablock_emulation::run_grid(
      config->gridDim, config->blockDim, config->dynamicSmemBytes,
      [](void* context) { (*static_cast<decltype(thread)*>(context))(); }, &thread);
  return cudaSuccess;
}
