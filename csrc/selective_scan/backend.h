// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/host/op_call.h"
#include "selective_scan/params.h"

namespace mambablock {

// A checked call: its parameters, and what keeps their memory alive.
struct SelectiveScanCall : OpCall {
  using OpCall::OpCall;

  SelectiveScanParams params{};
  int64_t group_partials = 0;    // of dB and dC, for each row of the batch
  int64_t channel_partials = 0;  // of the other sums
};

// A device's part, in cpu.cpp and cuda.cpp: first where the sequences begin, how many saved states
// a row has and how many partial sums there are, then the kernels.
void prepare(SelectiveScanCall& call);
void run_forward(SelectiveScanCall& call);
void run_backward(SelectiveScanCall& call);

}  // namespace mambablock
