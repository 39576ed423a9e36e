// SPDX-License-Identifier: Apache-2.0
//
// causal_conv1d: the depthwise convolution of the Mamba block (Gu & Dao 2023, arXiv:2312.00752,
// figure 3), fused with its SiLU.
#include "causal_conv1d/backend.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace mambablock {
namespace {

CausalConv1dCall checked_call(const char* op, const Tensor& x, const Tensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& initial_state,
                              const OptionalTensor& cu_seqlens, bool silu, bool reverse) {
  CausalConv1dCall call(Checks(op, "x", x, 3, "(batch, length, d_inner)"));
  const Checks& checks = call.checks;
  const Size batch{"batch", x.size(0)}, length{"length", x.size(1)}, channels{"d_inner", x.size(2)};
  checks.positive("d_inner", channels.value);
  checks.parameter("weight", weight);
  if (weight.dim() != 2) fail(op, "weight", "(d_inner, d_conv)", shape_text(weight));
  const Size width{"d_conv", weight.size(1)};
  checks.shape("weight", weight, {channels, width});
  checks.positive("d_conv", width.value);
  if (bias) {
    checks.parameter("bias", *bias);
    checks.shape("bias", *bias, {channels});
  }
  call.cu_seqlens = cu_seqlens;
  call.reverse = reverse;
  call.states = state_count(checks, cu_seqlens, batch.value);
  if (initial_state) {
    checks.accumulator("initial_state", *initial_state);
    checks.shape("initial_state", *initial_state,
                 {{cu_seqlens ? "sequences" : "batch", call.states},
                  {"d_conv - 1", width.value - 1},
                  channels});
  }
  CausalConv1dParams& p = call.params;
  p.dtype = checks.dtype();
  p.batch = batch.value;
  p.length = length.value;
  p.channels = channels.value;
  p.width = width.value;
  p.silu = silu;
  p.x = strided_input(x, reverse);
  p.weight = call.keep(weight);
  p.bias = call.keep(bias);
  p.initial_state = call.keep(initial_state);
  p.sequences = cu_seqlens ? call.states : 1;
  prepare(call);
  return call;
}

std::tuple<Tensor, Tensor> causal_conv1d(Tensor x, Tensor weight, OptionalTensor bias,
                                         OptionalTensor initial_state, OptionalTensor cu_seqlens,
                                         bool silu, bool reverse) {
  CausalConv1dCall call =
      checked_call("causal_conv1d", x, weight, bias, initial_state, cu_seqlens, silu, reverse);
  CausalConv1dParams& p = call.params;
  const Tensor y = call.new_activations({p.batch, p.length, p.channels});
  const Tensor final_state = call.new_accumulators({call.states, p.width - 1, p.channels});
  p.y = strided_output(y, reverse);
  p.final_state = final_state.mutable_data_ptr();
  run_forward(call);
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(
    Tensor dy, Tensor dfinal_state, Tensor x, Tensor weight, OptionalTensor bias,
    OptionalTensor initial_state, OptionalTensor cu_seqlens, bool silu, bool reverse) {
  CausalConv1dCall call = checked_call("causal_conv1d_backward", x, weight, bias, initial_state,
                                       cu_seqlens, silu, reverse);
  CausalConv1dParams& p = call.params;
  const Checks& checks = call.checks;
  const Size channels{"d_inner", p.channels};
  checks.activation("dy", dy);
  checks.shape("dy", dy, {{"batch", p.batch}, {"length", p.length}, channels});
  checks.accumulator("dfinal_state", dfinal_state);
  checks.shape("dfinal_state", dfinal_state,
               {{"states", call.states}, {"d_conv - 1", p.width - 1}, channels});
  const Tensor dx = call.new_activations({p.batch, p.length, p.channels});
  const Tensor dinitial_state = initial_state
                                    ? call.new_accumulators({call.states, p.width - 1, p.channels})
                                    : call.new_accumulators({0});
  const Tensor dweight_partial = call.new_accumulators({call.partials, p.channels, p.width});
  const Tensor dbias_partial = call.new_accumulators({call.partials, p.channels});
  p.dy = strided_input(dy, reverse);
  p.dfinal_state = call.keep(dfinal_state);
  p.dx = strided_output(dx, reverse);
  p.dinitial_state = initial_state ? dinitial_state.mutable_data_ptr() : nullptr;
  p.dweight_partial = dweight_partial.mutable_data_ptr();
  p.dbias_partial = dbias_partial.mutable_data_ptr();
  run_backward(call);
  const Tensor dweight = sum_partials(dweight_partial, call.partials, weight);
  const Tensor dbias =
      bias ? sum_partials(dbias_partial, call.partials, *bias) : call.new_activations({0});
  return {dx, dweight, dbias, dinitial_state};
}

STABLE_TORCH_LIBRARY_IMPL(mambablock, MAMBABLOCK_DISPATCH_KEY, library) {
  library.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  library.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward));
}

}  // namespace
}  // namespace mambablock
