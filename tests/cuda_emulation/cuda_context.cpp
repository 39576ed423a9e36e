// SPDX-License-Identifier: Apache-2.0
//
// The emulated device is the CPU: it needs no guard and has one stream.
#include "common/host/cuda_context.h"

#include "common/host/cuda_driver.h"

namespace mambablock {
namespace {

int64_t attribute(cudaDeviceAttr name) {
  int value = 0;
  cudaDeviceGetAttribute(&value, name, 0);
  return value;
}

}  // namespace

struct CudaContext::Guard {};

CudaContext::CudaContext(const torch::stable::Tensor&) { check_driver(); }

CudaContext::~CudaContext() = default;

int64_t CudaContext::multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }

int64_t CudaContext::shared_memory_per_block() const {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

}  // namespace mambablock
