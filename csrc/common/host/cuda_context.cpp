// SPDX-License-Identifier: Apache-2.0
#include "common/host/cuda_context.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "common/host/cuda_driver.h"

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

}  // namespace

struct CudaContext::Guard {
  explicit Guard(int32_t device) : guard(device) {}
  torch::stable::accelerator::DeviceGuard guard;
};

CudaContext::CudaContext(const torch::stable::Tensor& tensor)
    : guard_(std::make_unique<Guard>(tensor.get_device_index())) {
  check_driver();
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
