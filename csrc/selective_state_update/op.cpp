// SPDX-License-Identifier: Apache-2.0
//
// selective_state_update: one decoding step of selective_scan.
#include "common/host/views.h"
#include "selective_scan/checks.h"
#include "selective_state_update/backend.h"

namespace mambablock {
namespace {

struct Arguments : ArgumentReader {
  using ArgumentReader::ArgumentReader;
  Tensor state = tensor(), u = tensor(), delta = tensor(), A = tensor(), B = tensor(), C = tensor();
  OptionalTensor D = optional_tensor(), z = optional_tensor(), delta_bias = optional_tensor();
  bool delta_softplus = boolean();
  OptionalTensor state_indices = optional_tensor();
};

std::array<Tensor, 1> selective_state_update(const Arguments& a) {
  const Checks checks("selective_state_update", "u", a.u, 2, "(batch, d_inner)");
  const ScanSizes sizes = check_scan(checks, a, {checks.batch()});
  const Size channels = checks.channels();
  const DType state_dtype = checks.state("state", a.state, "(rows, d_inner, d_state)", channels,
                                         {"d_state", sizes.d_state}, a.state_indices);
  const Tensor y = torch::stable::new_empty(a.u, {checks.batch().value, channels.value});
  const ScalarType type = checks.accumulator_type();
  const OptionalTensor A = contiguous_as(a.A, type), D = contiguous_as(a.D, type),
                       delta_bias = contiguous_as(a.delta_bias, type);
  const SelectiveStateUpdateParams p{
      .dtype = checks.dtype(),
      .state_dtype = state_dtype,
      .batch = checks.batch().value,
      .channels = channels.value,
      .d_state = sizes.d_state,
      .groups = sizes.groups,
      .rows = a.state.size(0),
      .delta_softplus = a.delta_softplus,
      .state = a.state.mutable_data_ptr(),
      .state_row = a.state.stride(0),
      .state_channel = a.state.stride(1),
      .state_stride = a.state.stride(2),
      .u = step_view(a.u),
      .delta = step_view(a.delta),
      .z = step_view(a.z),
      .B = grouped_step_view(a.B),
      .C = grouped_step_view(a.C),
      .A = data_of(A),
      .D = data_of(D),
      .delta_bias = data_of(delta_bias),
      .y = {y.mutable_data_ptr(), channels.value},
  };
  run_update(checks, p, a.state_indices);
  return {y};
}

STABLE_TORCH_LIBRARY_IMPL(mambablock, MAMBABLOCK_DISPATCH_KEY, library) {
  library.impl("selective_state_update", Boxed<&selective_state_update>::call);
}

}  // namespace
}  // namespace mambablock
