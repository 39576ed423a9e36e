// SPDX-License-Identifier: Apache-2.0
//
// The device and stream of a call. cuda_context.cpp asks torch and the CUDA runtime; the emulation
// of the kernels has its own.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>

namespace mambablock {

// Makes the tensor's device the current one for as long as it lives.
class [[gnu::visibility("hidden")]] CudaContext {
 public:
  explicit CudaContext(const torch::stable::Tensor& tensor);
  ~CudaContext();

  cudaStream_t stream() const { return stream_; }
  int64_t multiprocessors() const;
  int64_t shared_memory_per_block() const;  // in bytes, the most that a kernel can ask for

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace mambablock
