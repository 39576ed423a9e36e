// SPDX-License-Identifier: Apache-2.0
//
// selective_scan: Gu & Dao 2023 (arXiv:2312.00752), section 3.2, algorithm 2.
#include "common/host/partial_sums.h"
#include "common/host/views.h"
#include "selective_scan/backend.h"
#include "selective_scan/checks.h"

namespace mambablock {
namespace {

struct Arguments : ArgumentReader {
  using ArgumentReader::ArgumentReader;
  Tensor u = tensor(), delta = tensor(), A = tensor(), B = tensor(), C = tensor();
  OptionalTensor D = optional_tensor(), z = optional_tensor(), delta_bias = optional_tensor(),
                 initial_state = optional_tensor(), cu_seqlens = optional_tensor();
  bool delta_softplus = boolean(), reverse = boolean(), A_is_log = boolean();
};

struct ForwardArguments : Arguments {
  using Arguments::Arguments;
  bool save_states = boolean();
};

struct BackwardArguments : ArgumentReader {
  using ArgumentReader::ArgumentReader;
  Tensor dy = tensor();
  OptionalTensor dfinal_state = optional_tensor();
  Tensor saved_states = tensor();
  Arguments forward{next_};
};

struct Call : OpCall {
  Call(const char* op, const Arguments& a)
      : OpCall(Checks(op, "u", a.u, 3, "(batch, length, d_inner)"), a.cu_seqlens, a.reverse) {
    const Size length{"length", a.u.size(1)}, channels = checks.channels();
    const ScanSizes sizes = check_scan(checks, a, {checks.batch(), length});
    const Size rows{a.cu_seqlens ? "sequences" : "batch", states};
    checks.accumulator("initial_state", a.initial_state,
                       {rows, channels, {"d_state", sizes.d_state}});
    const int64_t group_channels = channels.value / sizes.groups;
    const auto view = [&](const OptionalTensor& tensor) {
      return input_view(tensor, reverse, group_channels);
    };
    inputs = {
        .dtype = checks.dtype(),
        .batch = checks.batch().value,
        .length = length.value,
        .channels = channels.value,
        .d_state = sizes.d_state,
        .groups = sizes.groups,
        .group_channels = group_channels,
        .sequences = a.cu_seqlens ? states : 1,
        .delta_softplus = a.delta_softplus,
        .u = view(a.u),
        .delta = view(a.delta),
        .z = view(a.z),
        .B = grouped_view(a.B, reverse),
        .C = grouped_view(a.C, reverse),
        .A = keep_parameter(a.A, a.A_is_log),
        .D = keep_parameter(a.D),
        .delta_bias = keep_parameter(a.delta_bias),
        .initial_state = keep(a.initial_state),
    };
  }

  // An activation-typed (B, L, D) output.
  Tensor new_output() const {
    return new_activations({inputs.batch, inputs.length, inputs.channels});
  }
  Tensor new_state() const { return new_accumulators({states, inputs.channels, inputs.d_state}); }
  OutputView view(const Tensor& output) const {
    return output_view(output, reverse, inputs.group_channels);
  }

  SelectiveScanInputs inputs;
};

std::array<Tensor, 3> selective_scan(const ForwardArguments& a) {
  const Call call("selective_scan", a);
  const SelectiveScanInputs& in = call.inputs;
  const auto plan = make_plan(call, in);
  const Tensor y = call.new_output(), final_state = call.new_state();
  const Tensor saved_states = torch::stable::new_empty(
      call.checks.input(),
      a.save_states ? std::vector<int64_t>{in.batch, plan->saved * in.d_state, in.channels}
                    : std::vector<int64_t>{0},
      plan->saved_type);
  SelectiveScanForward p{in};
  p.y = call.view(y);
  p.final_state = final_state.mutable_data_ptr();
  if (a.save_states) p.saved_states = saved_states.mutable_data_ptr();
  plan->forward(p);
  return {y, final_state, saved_states};
}

std::array<Tensor, 9> selective_scan_backward(const BackwardArguments& a) {
  const Arguments& f = a.forward;
  Call call("selective_scan_backward", f);
  const SelectiveScanInputs& in = call.inputs;
  const Checks& checks = call.checks;
  const Size batch = checks.batch(), channels = checks.channels();
  const auto plan = make_plan(call, in);
  checks.activation("dy", a.dy, {batch, {"length", in.length}, channels});
  checks.accumulator("dfinal_state", a.dfinal_state,
                     {{"states", call.states}, channels, {"d_state", in.d_state}});
  const Sizes saved{batch, {"saved * d_state", plan->saved * in.d_state}, channels};
  if (plan->saved_type == checks.accumulator_type()) {
    checks.accumulator("saved_states", a.saved_states, saved);
  } else {
    checks.activation("saved_states", a.saved_states, saved);
  }
  // Each absent gradient is an empty tensor of its own, since outputs must not share memory.
  const auto none = [&] { return call.new_activations({0}); };
  const Tensor du = call.new_output(), ddelta = call.new_output(),
               dz = f.z ? call.new_output() : none(),
               dinitial_state = f.initial_state ? call.new_state() : call.new_accumulators({0});
  const auto new_partial = [&](int64_t rows, std::vector<int64_t> sizes) {
    sizes.insert(sizes.begin(), rows);
    return call.new_accumulators(sizes);
  };
  const int64_t group_rows = plan->group_partials * in.batch, rows = plan->channel_partials,
                group_states = in.groups * in.d_state;
  const Tensor dB_partial = new_partial(group_rows, {in.length, group_states}),
               dC_partial = new_partial(group_rows, {in.length, group_states}),
               dA_partial = new_partial(rows, {in.channels, in.d_state}),
               dD_partial = new_partial(rows, {in.channels}),
               ddelta_bias_partial = new_partial(rows, {in.channels});
  SelectiveScanBackward p{in};
  p.dy = input_view(a.dy, call.reverse, in.group_channels);
  p.dfinal_state = call.keep(a.dfinal_state);
  p.saved_states = call.keep(a.saved_states, plan->saved_type);
  p.du = call.view(du);
  p.ddelta = call.view(ddelta);
  if (f.z) p.dz = call.view(dz);
  if (f.initial_state) p.dinitial_state = dinitial_state.mutable_data_ptr();
  p.dB_partial = call.view(dB_partial);
  p.dC_partial = call.view(dC_partial);
  p.dA_partial = dA_partial.mutable_data_ptr();
  p.dD_partial = dD_partial.mutable_data_ptr();
  p.ddelta_bias_partial = ddelta_bias_partial.mutable_data_ptr();
  plan->backward(p);

  std::vector<PartialSums> sums{{dA_partial, rows, f.A, f.A_is_log ? in.A : ParameterView{}},
                                {dB_partial, plan->group_partials, f.B},
                                {dC_partial, plan->group_partials, f.C}};
  if (f.D) sums.push_back({dD_partial, rows, *f.D});
  if (f.delta_bias) sums.push_back({ddelta_bias_partial, rows, *f.delta_bias});
  const std::vector<Tensor> totals = sum_partials(sums);
  return {du,
          ddelta,
          totals[0],
          totals[1],
          totals[2],
          f.D ? totals[3] : none(),
          dz,
          f.delta_bias ? totals.back() : none(),
          dinitial_state};
}

STABLE_TORCH_LIBRARY_IMPL(mambablock, MAMBABLOCK_DISPATCH_KEY, library) {
  library.impl("selective_scan", Boxed<&selective_scan>::call);
  library.impl("selective_scan_backward", Boxed<&selective_scan_backward>::call);
}

}  // namespace
}  // namespace mambablock
