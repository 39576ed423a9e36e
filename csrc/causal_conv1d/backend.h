// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/host/op_call.h"
#include "causal_conv1d/params.h"

namespace mambablock {

// A checked call: its parameters, and what keeps their memory alive.
struct CausalConv1dCall : OpCall {
  using OpCall::OpCall;

  CausalConv1dParams params{};
  int64_t partials = 0;  // of the sums over time and the batch
};

// A device's part, in cpu.cpp and cuda.cpp: first where the sequences begin and how many partial
// sums there are, then the kernels.
void prepare(CausalConv1dCall& call);
void run_forward(const CausalConv1dCall& call);
void run_backward(const CausalConv1dCall& call);

}  // namespace mambablock
