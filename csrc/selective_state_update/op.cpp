// SPDX-License-Identifier: Apache-2.0
//
// selective_state_update: one decoding step of selective_scan.
#include "selective_state_update/backend.h"

#include <torch/csrc/stable/library.h>

namespace mambablock {
namespace {

Strided4 strided_group_input(const Tensor& tensor) {
  const bool grouped = tensor.dim() == 3;
  return {tensor.const_data_ptr(), tensor.stride(0), 0, grouped ? tensor.stride(1) : 0,
          tensor.stride(grouped ? 2 : 1)};
}

Tensor selective_state_update(Tensor state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                              OptionalTensor D, OptionalTensor z, OptionalTensor delta_bias,
                              bool delta_softplus, OptionalTensor state_indices) {
  const Checks checks("selective_state_update", "u", u, 2, "(batch, d_inner)");
  const char* op = checks.op();
  const Size batch{"batch", u.size(0)}, channels{"d_inner", u.size(1)};
  checks.positive("d_inner", channels.value);
  checks.activation("delta", delta);
  checks.shape("delta", delta, {batch, channels});
  checks.parameter("A", A);
  if (A.dim() != 2) fail(op, "A", "(d_inner, d_state)", shape_text(A));
  const Size d_state{"d_state", A.size(1)};
  checks.shape("A", A, {channels, d_state});
  checks.positive("d_state", d_state.value);
  const bool grouped = B.dim() == 3;
  const Size groups{"groups", grouped ? B.size(1) : 1};
  for (const auto& [name, tensor] : {std::pair{"B", B}, std::pair{"C", C}}) {
    checks.activation(name, tensor);
    if (grouped) {
      checks.shape(name, tensor, {batch, groups, d_state});
    } else {
      checks.shape(name, tensor, {batch, d_state});
    }
  }
  if (groups.value < 1 || channels.value % groups.value != 0) {
    fail(op, "groups", "a divisor of d_inner=" + std::to_string(channels.value), groups.value);
  }
  for (const auto& [name, tensor] : {std::pair{"D", D}, std::pair{"delta_bias", delta_bias}}) {
    if (tensor) {
      checks.parameter(name, *tensor);
      checks.shape(name, *tensor, {channels});
    }
  }
  if (z) {
    checks.activation("z", *z);
    checks.shape("z", *z, {batch, channels});
  }
  SelectiveStateUpdateParams p{};
  p.state_dtype = checks.state("state", state);
  if (state.dim() != 3) fail(op, "state", "(rows, d_inner, d_state)", shape_text(state));
  checks.shape("state", state, {{"rows", state.size(0)}, channels, d_state});
  check_state_rows(checks, state_indices, batch.value, state.size(0));
  const Tensor y = torch::stable::new_empty(u, {batch.value, channels.value});
  const ScalarType type = checks.accumulator_type();
  const OptionalTensor A_rows = contiguous_as(A, type), D_row = contiguous_as(D, type),
                       bias_row = contiguous_as(delta_bias, type);
  p.dtype = checks.dtype();
  p.batch = batch.value;
  p.channels = channels.value;
  p.d_state = d_state.value;
  p.groups = groups.value;
  p.delta_softplus = delta_softplus;
  p.rows = state.size(0);
  p.state = state.mutable_data_ptr();
  p.state_row = state.stride(0);
  p.state_channel = state.stride(1);
  p.state_stride = state.stride(2);
  p.u = strided_step_input(u);
  p.delta = strided_step_input(delta);
  p.z = strided_step_input(z);
  p.B = strided_group_input(B);
  p.C = strided_group_input(C);
  p.A = data_of(A_rows);
  p.D = data_of(D_row);
  p.delta_bias = data_of(bias_row);
  p.y = {y.mutable_data_ptr(), channels.value, 0};
  run_update(p, checks, state_indices);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(mambablock, MAMBABLOCK_DISPATCH_KEY, library) {
  library.impl("selective_state_update", TORCH_BOX(&selective_state_update));
}

}  // namespace
}  // namespace mambablock
