// SPDX-License-Identifier: Apache-2.0
#include "causal_conv1d/cuda/kernels.h"

#include "common/host/cuda.h"
#include "causal_conv1d/backend.h"

namespace mambablock {

void prepare(CausalConv1dCall& call) {
  CausalConv1dParams& p = call.params;
  p.boundaries = device_boundaries(CudaContext(call.checks.input()), call, p.length);
  p.reverse = call.reverse;
  call.partials = p.batch * cuda_conv_chunks(p);
}

void run_forward(const CausalConv1dCall& call) {
  const CudaContext context(call.checks.input());
  cuda_forward(call.checks.op(), call.params, context.stream());
}

void run_backward(const CausalConv1dCall& call) {
  const CudaContext context(call.checks.input());
  cuda_backward(call.checks.op(), call.params, context.stream());
}

}  // namespace mambablock
