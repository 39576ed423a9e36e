// SPDX-License-Identifier: Apache-2.0
//
// causal_conv1d: the depthwise convolution of the Mamba block (Gu & Dao 2023, arXiv:2312.00752,
// figure 3), fused with its SiLU.
#include "causal_conv1d/backend.h"
#include "causal_conv1d/checks.h"
#include "common/host/partial_sums.h"
#include "common/host/views.h"

namespace mambablock {
namespace {

struct Arguments : ArgumentReader {
  using ArgumentReader::ArgumentReader;
  Tensor x = tensor(), weight = tensor();
  OptionalTensor bias = optional_tensor(), initial_state = optional_tensor(),
                 cu_seqlens = optional_tensor();
  bool silu = boolean(), reverse = boolean();
};

struct BackwardArguments : ArgumentReader {
  using ArgumentReader::ArgumentReader;
  Tensor dy = tensor();
  OptionalTensor dfinal_state = optional_tensor();
  Arguments forward{next_};
};

struct Call : OpCall {
  Call(const char* op, const Arguments& a)
      : OpCall(Checks(op, "x", a.x, 3, "(batch, length, d_inner)"), a.cu_seqlens, a.reverse) {
    const Size width = check_conv(checks, a);
    checks.accumulator("initial_state", a.initial_state,
                       {{a.cu_seqlens ? "sequences" : "batch", states},
                        {"d_conv - 1", width.value - 1},
                        checks.channels()});
    inputs = {
        .dtype = checks.dtype(),
        .batch = checks.batch().value,
        .length = a.x.size(1),
        .channels = checks.channels().value,
        .width = width.value,
        .sequences = a.cu_seqlens ? states : 1,
        .silu = a.silu,
        .x = view(a.x),
        .weight = keep_parameter(a.weight),
        .bias = keep_parameter(a.bias),
        .initial_state = keep(a.initial_state),
    };
  }

  InputView view(const Tensor& input) const {
    return input_view(input, reverse, checks.channels().value);
  }
  OutputView output(const Tensor& tensor) const {
    return output_view(tensor, reverse, inputs.channels);
  }
  Tensor new_output() const {
    return new_activations({inputs.batch, inputs.length, inputs.channels});
  }
  Tensor new_state() const { return new_accumulators({states, inputs.width - 1, inputs.channels}); }

  CausalConv1dInputs inputs;
};

std::array<Tensor, 2> causal_conv1d(const Arguments& a) {
  const Call call("causal_conv1d", a);
  const auto plan = make_plan(call, call.inputs);
  const Tensor y = call.new_output(), final_state = call.new_state();
  CausalConv1dForward p{call.inputs};
  p.y = call.output(y);
  p.final_state = final_state.mutable_data_ptr();
  plan->forward(p);
  return {y, final_state};
}

std::array<Tensor, 4> causal_conv1d_backward(const BackwardArguments& a) {
  const Arguments& f = a.forward;
  Call call("causal_conv1d_backward", f);
  const CausalConv1dInputs& in = call.inputs;
  const auto plan = make_plan(call, in);
  const Size channels = call.checks.channels();
  call.checks.activation("dy", a.dy, {call.checks.batch(), {"length", in.length}, channels});
  call.checks.accumulator("dfinal_state", a.dfinal_state,
                          {{"states", call.states}, {"d_conv - 1", in.width - 1}, channels});
  const Tensor dx = call.new_output();
  const Tensor dinitial_state = f.initial_state ? call.new_state() : call.new_accumulators({0});
  const Tensor dweight_partial = call.new_accumulators({plan->partials, in.channels, in.width});
  const Tensor dbias_partial = call.new_accumulators({plan->partials, in.channels});
  CausalConv1dBackward p{in};
  p.dy = call.view(a.dy);
  p.dfinal_state = call.keep(a.dfinal_state);
  p.dx = call.output(dx);
  if (f.initial_state) p.dinitial_state = dinitial_state.mutable_data_ptr();
  p.dweight_partial = dweight_partial.mutable_data_ptr();
  p.dbias_partial = dbias_partial.mutable_data_ptr();
  plan->backward(p);
  std::vector<PartialSums> sums{{dweight_partial, plan->partials, f.weight}};
  if (f.bias) sums.push_back({dbias_partial, plan->partials, *f.bias});
  const std::vector<Tensor> totals = sum_partials(sums);
  return {dx, totals[0], f.bias ? totals[1] : call.new_activations({0}), dinitial_state};
}

STABLE_TORCH_LIBRARY_IMPL(mambablock, MAMBABLOCK_DISPATCH_KEY, library) {
  library.impl("causal_conv1d", Boxed<&causal_conv1d>::call);
  library.impl("causal_conv1d_backward", Boxed<&causal_conv1d_backward>::call);
}

}  // namespace
}  // namespace mambablock
