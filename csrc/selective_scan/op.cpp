// SPDX-License-Identifier: Apache-2.0
//
// selective_scan: Gu & Dao 2023 (arXiv:2312.00752), section 3.2, algorithm 2.
#include "selective_scan/backend.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace mambablock {
namespace {

struct Arguments {
  Tensor u, delta, A, B, C;
  OptionalTensor D, z, delta_bias, initial_state, cu_seqlens;
  bool delta_softplus, reverse;
};

Strided4 strided_group_input(const Tensor& tensor, bool reverse) {
  const bool grouped = tensor.dim() == 4;
  const Strided3 view = strided_input(tensor, reverse);
  const int64_t group = grouped ? tensor.stride(2) : 0, state = tensor.stride(grouped ? 3 : 2);
  const bool packs =
      state == 1 && movable_in_packs(view.data, tensor.element_size(), tensor.size(grouped ? 3 : 2),
                                     {view.batch, view.time, group});
  return {view.data, view.batch, view.time, group, state, packs};
}

void check_group_input(const Checks& checks, const char* argument, const Tensor& tensor,
                       const Arguments& a, int64_t d_state, bool grouped) {
  const Size batch{"batch", a.u.size(0)}, length{"length", a.u.size(1)}, state{"d_state", d_state};
  checks.activation(argument, tensor);
  if (grouped) {
    const int64_t groups = a.B.dim() == 4 ? a.B.size(2) : 1;
    checks.shape(argument, tensor, {batch, length, {"groups", groups}, state});
  } else {
    checks.shape(argument, tensor, {batch, length, state});
  }
}

SelectiveScanCall checked_call(const char* op, const Arguments& a) {
  SelectiveScanCall call(Checks(op, "u", a.u, 3, "(batch, length, d_inner)"));
  const Checks& checks = call.checks;
  const Size batch{"batch", a.u.size(0)}, length{"length", a.u.size(1)},
      channels{"d_inner", a.u.size(2)};
  checks.positive("d_inner", channels.value);
  checks.activation("delta", a.delta);
  checks.shape("delta", a.delta, {batch, length, channels});
  checks.parameter("A", a.A);
  if (a.A.dim() != 2) fail(op, "A", "(d_inner, d_state)", shape_text(a.A));
  const Size state{"d_state", a.A.size(1)};
  checks.shape("A", a.A, {channels, state});
  checks.positive("d_state", state.value);
  const bool grouped = a.B.dim() == 4;
  check_group_input(checks, "B", a.B, a, state.value, grouped);
  check_group_input(checks, "C", a.C, a, state.value, grouped);
  const int64_t groups = grouped ? a.B.size(2) : 1;
  if (groups < 1 || channels.value % groups != 0) {
    fail(op, "groups", "a divisor of d_inner=" + std::to_string(channels.value), groups);
  }
  if (a.D) {
    checks.parameter("D", *a.D);
    checks.shape("D", *a.D, {channels});
  }
  if (a.z) {
    checks.activation("z", *a.z);
    checks.shape("z", *a.z, {batch, length, channels});
  }
  if (a.delta_bias) {
    checks.parameter("delta_bias", *a.delta_bias);
    checks.shape("delta_bias", *a.delta_bias, {channels});
  }
  call.cu_seqlens = a.cu_seqlens;
  call.reverse = a.reverse;
  call.states = state_count(checks, a.cu_seqlens, batch.value);
  if (a.initial_state) {
    checks.accumulator("initial_state", *a.initial_state);
    checks.shape("initial_state", *a.initial_state,
                 {{a.cu_seqlens ? "sequences" : "batch", call.states}, channels, state});
  }
  SelectiveScanParams& p = call.params;
  p.dtype = checks.dtype();
  p.batch = batch.value;
  p.length = length.value;
  p.channels = channels.value;
  p.d_state = state.value;
  p.groups = groups;
  p.group_channels = p.channels / groups;
  p.delta_softplus = a.delta_softplus;
  p.u = strided_input(a.u, a.reverse);
  p.delta = strided_input(a.delta, a.reverse);
  p.z = strided_input(a.z, a.reverse);
  p.B = strided_group_input(a.B, a.reverse);
  p.C = strided_group_input(a.C, a.reverse);
  p.A = call.keep(a.A);
  p.D = call.keep(a.D);
  p.delta_bias = call.keep(a.delta_bias);
  p.initial_state = call.keep(a.initial_state);
  p.sequences = a.cu_seqlens ? call.states : 1;
  prepare(call);
  return call;
}

std::tuple<Tensor, Tensor, Tensor> selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B,
                                                  Tensor C, OptionalTensor D, OptionalTensor z,
                                                  OptionalTensor delta_bias,
                                                  OptionalTensor initial_state,
                                                  OptionalTensor cu_seqlens, bool delta_softplus,
                                                  bool reverse, bool save_states) {
  SelectiveScanCall call = checked_call(
      "selective_scan",
      {u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse});
  SelectiveScanParams& p = call.params;
  const Tensor y = call.new_activations({p.batch, p.length, p.channels});
  const Tensor final_state = call.new_accumulators({call.states, p.channels, p.d_state});
  const Tensor saved_states =
      save_states ? call.new_accumulators({p.batch, p.tiles * p.d_state, p.channels})
                  : call.new_accumulators({0});
  p.y = strided_output(y, reverse);
  p.final_state = final_state.mutable_data_ptr();
  p.saved_states = save_states ? saved_states.mutable_data_ptr() : nullptr;
  run_forward(call);
  return {y, final_state, saved_states};
}

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients selective_scan_backward(Tensor dy, Tensor dfinal_state, Tensor u, Tensor delta, Tensor A,
                                  Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
                                  OptionalTensor delta_bias, OptionalTensor initial_state,
                                  OptionalTensor cu_seqlens, Tensor saved_states,
                                  bool delta_softplus, bool reverse) {
  const char* op = "selective_scan_backward";
  SelectiveScanCall call = checked_call(op, {u, delta, A, B, C, D, z, delta_bias, initial_state,
                                             cu_seqlens, delta_softplus, reverse});
  SelectiveScanParams& p = call.params;
  const Checks& checks = call.checks;
  const Size batch{"batch", p.batch}, channels{"d_inner", p.channels}, state{"d_state", p.d_state};
  checks.activation("dy", dy);
  checks.shape("dy", dy, {batch, {"length", p.length}, channels});
  checks.accumulator("dfinal_state", dfinal_state);
  checks.shape("dfinal_state", dfinal_state, {{"states", call.states}, channels, state});
  checks.accumulator("saved_states", saved_states);
  checks.shape("saved_states", saved_states,
               {batch, {"tiles * d_state", p.tiles * p.d_state}, channels});
  const Tensor du = call.new_activations({p.batch, p.length, p.channels});
  const Tensor ddelta = call.new_activations({p.batch, p.length, p.channels});
  const Tensor none = call.new_activations({0});
  const Tensor dz = z ? call.new_activations({p.batch, p.length, p.channels}) : none;
  const Tensor dinitial_state = initial_state
                                    ? call.new_accumulators({call.states, p.channels, p.d_state})
                                    : call.new_accumulators({0});
  const int64_t group_states = p.groups * p.d_state, rows = call.channel_partials;
  const Tensor dB_partial =
      call.new_accumulators({call.group_partials * p.batch, p.length, group_states});
  const Tensor dC_partial =
      call.new_accumulators({call.group_partials * p.batch, p.length, group_states});
  const Tensor dA_partial = call.new_accumulators({rows, p.channels, p.d_state});
  const Tensor dD_partial = call.new_accumulators({rows, p.channels});
  const Tensor ddelta_bias_partial = call.new_accumulators({rows, p.channels});
  p.dy = strided_input(dy, reverse);
  p.dfinal_state = call.keep(dfinal_state);
  p.saved_states = const_cast<void*>(call.keep(saved_states));
  p.du = strided_output(du, reverse);
  p.ddelta = strided_output(ddelta, reverse);
  if (z) p.dz = strided_output(dz, reverse);
  if (initial_state) p.dinitial_state = dinitial_state.mutable_data_ptr();
  p.dB_partial = strided_output(dB_partial, reverse);
  p.dC_partial = strided_output(dC_partial, reverse);
  p.dA_partial = dA_partial.mutable_data_ptr();
  p.dD_partial = dD_partial.mutable_data_ptr();
  p.ddelta_bias_partial = ddelta_bias_partial.mutable_data_ptr();
  run_backward(call);

  const Tensor dB = sum_partials(dB_partial, call.group_partials, B);
  const Tensor dC = sum_partials(dC_partial, call.group_partials, C);
  const Tensor dA = sum_partials(dA_partial, rows, A);
  const Tensor dD = D ? sum_partials(dD_partial, rows, *D) : none;
  const Tensor ddelta_bias =
      delta_bias ? sum_partials(ddelta_bias_partial, rows, *delta_bias) : none;
  return {du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state};
}

STABLE_TORCH_LIBRARY_IMPL(mambablock, MAMBABLOCK_DISPATCH_KEY, library) {
  library.impl("selective_scan", TORCH_BOX(&selective_scan));
  library.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward));
}

}  // namespace
}  // namespace mambablock
