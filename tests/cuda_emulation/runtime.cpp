// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <stdlib.h>

#include <fstream>
#include <iomanip>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace {

constexpr int kStaticSharedMemory = 48 << 10;

std::mutex mutex;
std::map<const void*, int> shared_memory_limits;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

int variable(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value == nullptr ? otherwise : atoi(value);
}

int shared_memory_opt_in() { return variable("MAMBABLOCK_EMULATION_SHARED_MEMORY", 227 << 10); }

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = variable("MAMBABLOCK_EMULATION_DRIVER", CUDART_VERSION);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return result(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kStaticSharedMemory;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = variable("MAMBABLOCK_EMULATION_MULTIPROCESSORS", 4);
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = shared_memory_opt_in();
      return cudaSuccess;
  }
  return result(cudaErrorInvalidValue);
}

namespace mambablock_emulation {

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > shared_memory_opt_in()) return result(cudaErrorInvalidValue);
  const std::lock_guard lock(mutex);
  shared_memory_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t check_launch(const void* kernel, const cudaLaunchConfig_t& config) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const auto within = [](unsigned value, unsigned most) { return value >= 1 && value <= most; };
  if (!within(grid.x, 0x7fffffff) || !within(grid.y, 65535) || !within(grid.z, 65535) ||
      !within(block.x, 1024) || !within(block.y, 1024) || !within(block.z, 64) ||
      block.x * block.y * block.z > 1024) {
    return result(cudaErrorInvalidConfiguration);
  }
  const std::lock_guard lock(mutex);
  const auto limit = shared_memory_limits.find(kernel);
  const int most = limit == shared_memory_limits.end() ? kStaticSharedMemory : limit->second;
  if (config.dynamicSmemBytes > size_t(most) || config.numAttrs != 0) {
    return result(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

bool record_launch(const void* kernel, const cudaLaunchConfig_t& config,
                   std::initializer_list<Parameter> parameters) {
  const char* path = getenv("MAMBABLOCK_EMULATION_RECORD");
  if (path == nullptr) return false;
  std::vector<unsigned char> bytes;
  for (const Parameter& parameter : parameters) {
    while (bytes.size() % parameter.alignment != 0) bytes.push_back(0);
    const auto* data = static_cast<const unsigned char*>(parameter.data);
    bytes.insert(bytes.end(), data, data + parameter.size);
  }
  Dl_info library{};
  dladdr(kernel, &library);
  std::ofstream file(path, std::ios::app);
  const auto sizes = [&](const char* name, dim3 size) {
    file << "\"" << name << "\": [" << size.x << ", " << size.y << ", " << size.z << "], ";
  };
  // The kernel is told by where in its library it is, as the library's symbols have it.
  file << "{\"kernel\": "
       << static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase) << ", ";
  sizes("grid", config.gridDim);
  sizes("block", config.blockDim);
  file << "\"shared\": " << config.dynamicSmemBytes << ", \"parameters\": \"" << std::hex
       << std::setfill('0');
  for (const unsigned char byte : bytes) file << std::setw(2) << int(byte);
  file << "\"}\n";
  return true;
}

}  // namespace mambablock_emulation
