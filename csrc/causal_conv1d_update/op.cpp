// SPDX-License-Identifier: Apache-2.0
//
// causal_conv1d_update: one decoding step of causal_conv1d.
#include "causal_conv1d_update/backend.h"

#include <torch/csrc/stable/library.h>

namespace mambablock {
namespace {

Tensor causal_conv1d_update(Tensor state, Tensor x, Tensor weight, OptionalTensor bias, bool silu,
                            OptionalTensor state_indices) {
  const Checks checks("causal_conv1d_update", "x", x, 2, "(batch, d_inner)");
  const Size channels{"d_inner", x.size(1)};
  checks.positive("d_inner", channels.value);
  checks.parameter("weight", weight);
  if (weight.dim() != 2) fail(checks.op(), "weight", "(d_inner, d_conv)", shape_text(weight));
  const Size width{"d_conv", weight.size(1)};
  checks.shape("weight", weight, {channels, width});
  checks.positive("d_conv", width.value);
  if (bias) {
    checks.parameter("bias", *bias);
    checks.shape("bias", *bias, {channels});
  }
  CausalConv1dUpdateParams p{};
  p.state_dtype = checks.state("state", state);
  if (state.dim() != 3)
    fail(checks.op(), "state", "(rows, d_conv - 1, d_inner)", shape_text(state));
  checks.shape("state", state,
               {{"rows", state.size(0)}, {"d_conv - 1", width.value - 1}, channels});
  check_state_rows(checks, state_indices, x.size(0), state.size(0));
  const Tensor y = torch::stable::new_empty(x, {x.size(0), channels.value});
  const OptionalTensor taps = contiguous_as(weight, checks.accumulator_type());
  const OptionalTensor bias_row = contiguous_as(bias, checks.accumulator_type());
  p.dtype = checks.dtype();
  p.batch = x.size(0);
  p.channels = channels.value;
  p.width = width.value;
  p.silu = silu;
  p.rows = state.size(0);
  p.state = state.mutable_data_ptr();
  p.state_row = state.stride(0);
  p.state_step = state.stride(1);
  p.state_channel = state.stride(2);
  p.x = strided_step_input(x);
  p.taps = data_of(taps);
  p.bias = data_of(bias_row);
  p.y = {y.mutable_data_ptr(), channels.value, 0};
  run_update(p, checks, state_indices);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(mambablock, MAMBABLOCK_DISPATCH_KEY, library) {
  library.impl("causal_conv1d_update", TORCH_BOX(&causal_conv1d_update));
}

}  // namespace
}  // namespace mambablock
