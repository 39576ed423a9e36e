// SPDX-License-Identifier: Apache-2.0
#include "common/host/cuda_context.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

namespace mambablock {
namespace {

int64_t attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, name, device);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("mambablock: the CUDA device must have attributes; got ") +
                             cudaGetErrorString(error));
  }
  return value;
}

// The driver must be of the runtime's major version, or newer.
void check_driver() {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  constexpr int needed = CUDART_VERSION / 1000;
  if (driver / 1000 >= needed) return;
  throw std::runtime_error("mambablock: the CUDA driver must be for CUDA " +
                           std::to_string(needed) + " or newer; got one for CUDA " +
                           std::to_string(driver / 1000) + "." +
                           std::to_string(driver % 1000 / 10) +
                           "; update it, or build mambablock from source with an older nvcc");
}

}  // namespace

struct CudaContext::Guard {
  explicit Guard(int32_t device) : guard(device) {}
  torch::stable::accelerator::DeviceGuard guard;
};

CudaContext::CudaContext(const torch::stable::Tensor& tensor)
    : guard_(std::make_unique<Guard>(tensor.get_device_index())) {
  [[maybe_unused]] static const bool checked = (check_driver(), true);
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) !=
      AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("mambablock: the CUDA device must have a current stream; got none");
  }
  stream_ = static_cast<cudaStream_t>(stream);
}

CudaContext::~CudaContext() = default;

int64_t CudaContext::multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }

int64_t CudaContext::shared_memory_per_block() const {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

}  // namespace mambablock
