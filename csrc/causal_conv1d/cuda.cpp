// SPDX-License-Identifier: Apache-2.0
#include "common/host/cuda.h"

#include "causal_conv1d/backend.h"
#include "causal_conv1d/cuda/kernels.h"

namespace mambablock {
namespace {

// Long chunks load fewer steps twice and leave fewer partial sums; short ones keep a device busy
// whose batch and channels are few.
constexpr int64_t kLongestChunk = 128, kShortestChunk = 16;
constexpr int64_t kThreadsPerMultiprocessor = 256;

int64_t chunk_steps(const CudaContext& context, const CausalConv1dInputs& in) {
  const int64_t steps_of_threads = in.batch * in.length * in.channels / 8;
  const int64_t wanted = kThreadsPerMultiprocessor * context.multiprocessors();
  int64_t steps = kLongestChunk;
  while (steps > kShortestChunk && steps_of_threads / steps < wanted) steps /= 2;
  return steps;
}

class CudaPlan final : public CausalConv1dPlan {
 public:
  CudaPlan(const OpCall& call, const CausalConv1dInputs& in)
      : call_(call), boundaries_(device_boundaries(call, in.length)) {
    const CudaContext context(call.checks.input());
    plan_.boundaries = static_cast<const int64_t*>(data_of(boundaries_));
    plan_.reverse = call.reverse;
    plan_.chunk_steps = chunk_steps(context, in);
    plan_.chunks = in.length == 0 ? 1 : (in.length + plan_.chunk_steps - 1) / plan_.chunk_steps;
    partials = in.batch * plan_.chunks;
  }

  void forward(const CausalConv1dForward& p) const override {
    const CudaContext context(call_.checks.input());
    cuda_forward(call_.checks.op(), p, plan_, context.stream());
  }

  void backward(const CausalConv1dBackward& p) const override {
    const CudaContext context(call_.checks.input());
    ConvCudaPlan plan = plan_;
    OptionalTensor gradients;
    if (p.width > kCudaConvTaps) {
      gradients = call_.new_accumulators(
          {p.batch * plan.chunks * (plan.chunk_steps + p.width - 1), p.channels});
      plan.gradients = gradients->mutable_data_ptr();
    }
    cuda_backward(call_.checks.op(), p, plan, context.stream());
  }

 private:
  const OpCall& call_;
  OptionalTensor boundaries_;
  ConvCudaPlan plan_{};
};

}  // namespace

std::unique_ptr<CausalConv1dPlan> make_plan(const OpCall& call, const CausalConv1dInputs& inputs) {
  return std::make_unique<CudaPlan>(call, inputs);
}

}  // namespace mambablock
