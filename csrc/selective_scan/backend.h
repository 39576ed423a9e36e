// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "common/host/op_call.h"
#include "selective_scan/params.h"

namespace mambablock {

// What op.cpp asks of a device, in cpu.cpp and cuda.cpp: how a call is divided, and its kernels.
class [[gnu::visibility("hidden")]] SelectiveScanPlan {
 public:
  virtual ~SelectiveScanPlan() = default;
  virtual void forward(const SelectiveScanForward& p) const = 0;
  virtual void backward(const SelectiveScanBackward& p) const = 0;

  int64_t saved = 0;             // states of a row that are saved for the backward
  ScalarType saved_type{};       // of them
  int64_t group_partials = 0;    // of dB and dC, for each row of the batch
  int64_t channel_partials = 0;  // of the other sums
};

// The plan refers to the call, which outlives it.
std::unique_ptr<SelectiveScanPlan> make_plan(const OpCall& call, const SelectiveScanInputs& inputs);

}  // namespace mambablock
