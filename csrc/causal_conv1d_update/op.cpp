// SPDX-License-Identifier: Apache-2.0
//
// causal_conv1d_update: one decoding step of causal_conv1d.
#include "causal_conv1d/checks.h"
#include "causal_conv1d_update/backend.h"
#include "common/host/views.h"

namespace mambablock {
namespace {

struct Arguments : ArgumentReader {
  using ArgumentReader::ArgumentReader;
  Tensor state = tensor(), x = tensor(), weight = tensor();
  OptionalTensor bias = optional_tensor();
  bool silu = boolean();
  OptionalTensor state_indices = optional_tensor();
};

std::array<Tensor, 1> causal_conv1d_update(const Arguments& a) {
  const Checks checks("causal_conv1d_update", "x", a.x, 2, "(batch, d_inner)");
  const Size width = check_conv(checks, a), channels = checks.channels();
  const DType state_dtype =
      checks.state("state", a.state, "(rows, d_conv - 1, d_inner)", {"d_conv - 1", width.value - 1},
                   channels, a.state_indices);
  const Tensor y = torch::stable::new_empty(a.x, {checks.batch().value, channels.value});
  const OptionalTensor weight = contiguous_as(a.weight, checks.accumulator_type()),
                       bias = contiguous_as(a.bias, checks.accumulator_type());
  const CausalConv1dUpdateParams p{
      .dtype = checks.dtype(),
      .state_dtype = state_dtype,
      .batch = checks.batch().value,
      .channels = channels.value,
      .width = width.value,
      .rows = a.state.size(0),
      .silu = a.silu,
      .state = a.state.mutable_data_ptr(),
      .state_row = a.state.stride(0),
      .state_step = a.state.stride(1),
      .state_channel = a.state.stride(2),
      .x = step_view(a.x),
      .weight = data_of(weight),
      .bias = data_of(bias),
      .y = {y.mutable_data_ptr(), channels.value},
  };
  run_update(checks, p, a.state_indices);
  return {y};
}

STABLE_TORCH_LIBRARY_IMPL(mambablock, MAMBABLOCK_DISPATCH_KEY, library) {
  library.impl("causal_conv1d_update", Boxed<&causal_conv1d_update>::call);
}

}  // namespace
}  // namespace mambablock
