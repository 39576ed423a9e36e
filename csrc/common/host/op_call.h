// SPDX-License-Identifier: Apache-2.0
//
// What calls of the operators over sequences share, on every device.
#pragma once

#include <vector>

#include "common/host/checks.h"
#include "common/time_segments.h"

namespace mambablock {

using OptionalTensor = std::optional<Tensor>;

struct OpCall {
  explicit OpCall(const Checks& checks) : checks(checks) {}

  // The data of a contiguous copy in the accumulator's type, which lives as long as the call does.
  const void* keep(const OptionalTensor& tensor) {
    kept.push_back(contiguous_as(tensor, checks.accumulator_type()));
    return data_of(kept.back());
  }

  Tensor new_accumulators(std::vector<int64_t> shape) const {
    return torch::stable::new_empty(checks.input(), shape, checks.accumulator_type());
  }
  Tensor new_activations(std::vector<int64_t> shape) const {
    return torch::stable::new_empty(checks.input(), shape);
  }

  Checks checks;
  OptionalTensor cu_seqlens;
  bool reverse = false;
  int64_t states = 0;  // rows of the batch, or packed sequences
  std::vector<OptionalTensor> kept;
  std::vector<Segment> segments;  // of one row, on the CPU
};

}  // namespace mambablock
