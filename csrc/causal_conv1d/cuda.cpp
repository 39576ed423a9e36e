// SPDX-License-Identifier: Apache-2.0
#include "common/host/cuda.h"

#include "causal_conv1d/backend.h"
#include "causal_conv1d/cuda/kernels.h"

namespace mambablock {
namespace {

class CudaPlan final : public CausalConv1dPlan {
 public:
  CudaPlan(const OpCall& call, const CausalConv1dInputs& in)
      : call_(call), boundaries_(device_boundaries(call, in.length)) {
    partials = in.batch * cuda_conv_chunks(in);
  }

  void forward(const CausalConv1dForward& p) const override {
    const CudaContext context(call_.checks.input());
    cuda_forward(call_.checks.op(), p, kernel_plan(), context.stream());
  }

  void backward(const CausalConv1dBackward& p) const override {
    const CudaContext context(call_.checks.input());
    cuda_backward(call_.checks.op(), p, kernel_plan(), context.stream());
  }

 private:
  ConvCudaPlan kernel_plan() const {
    return {static_cast<const int64_t*>(data_of(boundaries_)), call_.reverse};
  }

  const OpCall& call_;
  OptionalTensor boundaries_;
};

}  // namespace

std::unique_ptr<CausalConv1dPlan> make_plan(const OpCall& call, const CausalConv1dInputs& inputs) {
  return std::make_unique<CudaPlan>(call, inputs);
}

}  // namespace mambablock
