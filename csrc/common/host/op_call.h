// SPDX-License-Identifier: Apache-2.0
//
// What calls of the operators over sequences share, on every device.
#pragma once

#include <vector>

#include "common/host/parameters.h"

namespace mambablock {

// A checked call, which keeps the memory that its views and pointers lead to.
class [[gnu::visibility("hidden")]] OpCall {
 public:
  OpCall(Checks checks, OptionalTensor cu_seqlens, bool reverse)
      : checks(std::move(checks)),
        cu_seqlens(std::move(cu_seqlens)),
        reverse(reverse),
        states(state_count(this->checks, this->cu_seqlens)) {}
  OpCall(OpCall&&) = default;
  OpCall(const OpCall&) = delete;

  // The data of a contiguous copy in the accumulator's type, which lives as long as the call does.
  const void* keep(const OptionalTensor& tensor) { return keep(tensor, checks.accumulator_type()); }
  const void* keep(const OptionalTensor& tensor, ScalarType type) {
    kept_.push_back(contiguous_as(tensor, type));
    return data_of(kept_.back());
  }
  ParameterView keep_parameter(const OptionalTensor& tensor, bool is_log = false) {
    const KernelParameter parameter = kernel_parameter(checks, tensor, is_log);
    kept_.push_back(parameter.tensor);
    return parameter.view;
  }

  Tensor new_accumulators(std::vector<int64_t> shape) const {
    return torch::stable::new_empty(checks.input(), shape, checks.accumulator_type());
  }
  Tensor new_activations(std::vector<int64_t> shape) const {
    return torch::stable::new_empty(checks.input(), shape);
  }

  const Checks checks;
  const OptionalTensor cu_seqlens;
  const bool reverse;
  const int64_t states;  // rows of the batch, or packed sequences

 private:
  std::vector<OptionalTensor> kept_;
};

}  // namespace mambablock
