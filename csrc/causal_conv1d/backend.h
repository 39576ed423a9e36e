// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "causal_conv1d/params.h"
#include "common/host/op_call.h"

namespace mambablock {

// What op.cpp asks of a device, in cpu.cpp and cuda.cpp: how a call is divided, and its kernels.
class [[gnu::visibility("hidden")]] CausalConv1dPlan {
 public:
  virtual ~CausalConv1dPlan() = default;
  virtual void forward(const CausalConv1dForward& p) const = 0;
  virtual void backward(const CausalConv1dBackward& p) const = 0;

  int64_t partials = 0;  // of the sums over time and the batch
};

// The plan refers to the call, which outlives it.
std::unique_ptr<CausalConv1dPlan> make_plan(const OpCall& call, const CausalConv1dInputs& inputs);

}  // namespace mambablock
