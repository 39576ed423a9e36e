// SPDX-License-Identifier: Apache-2.0
//
// What a scan hands from one piece of a sequence to the next, without y: forward, the final state
// of a piece whose initial state is 0, and with its sum of dt the piece's decay, exp(A * sum dt);
// backward, the gradient of the initial state where that of the final one is 0.
#include "common/host/views.h"
#include "selective_scan/checks.h"
#include "selective_scan_carry/backend.h"

namespace mambablock {
namespace {

struct ForwardArguments : ArgumentReader {
  using ArgumentReader::ArgumentReader;
  Tensor u = tensor(), delta = tensor(), A = tensor(), B = tensor();
  OptionalTensor delta_bias = optional_tensor(), cu_seqlens = optional_tensor();
  bool delta_softplus = boolean(), reverse = boolean();
};

struct BackwardArguments : ArgumentReader {
  using ArgumentReader::ArgumentReader;
  Tensor dy = tensor(), delta = tensor(), A = tensor(), C = tensor();
  OptionalTensor z = optional_tensor(), delta_bias = optional_tensor(),
                 cu_seqlens = optional_tensor();
  bool delta_softplus = boolean(), reverse = boolean();
};

// `input` is scanned by `by`: u by B, or dy by C.
template <class Arguments>
struct Call : OpCall {
  Call(const char* op, const Arguments& a, const char* input_name, const Tensor& input,
       const char* by_name, const Tensor& by, const OptionalTensor& z)
      : OpCall(Checks(op, input_name, input, 3, "(batch, length, d_inner)"), a.cu_seqlens,
               a.reverse) {
    const Size length{"length", input.size(1)}, channels = checks.channels();
    const Sizes steps{checks.batch(), length};
    checks.activation("delta", a.delta, steps.followed_by({channels}));
    const Size d_state = checks.matrix("A", a.A, channels, "d_state");
    const int64_t groups = check_groups(checks, by_name, by, steps, d_state);
    checks.activation("z", z, steps.followed_by({channels}));
    checks.parameter("delta_bias", a.delta_bias, {channels});
    const int64_t group_channels = channels.value / groups;
    const auto view = [&](const OptionalTensor& tensor) {
      return input_view(tensor, reverse, group_channels);
    };
    p.dtype = checks.dtype();
    p.batch = checks.batch().value;
    p.length = length.value;
    p.channels = channels.value;
    p.d_state = d_state.value;
    p.groups = groups;
    p.group_channels = group_channels;
    p.sequences = a.cu_seqlens ? states : 1;
    p.delta_softplus = a.delta_softplus;
    p.u = view(input);
    p.delta = view(a.delta);
    p.z = view(z);
    p.B = grouped_view(by, reverse);
    p.A = keep_parameter(a.A);
    p.delta_bias = keep_parameter(a.delta_bias);
  }

  Tensor new_state() const { return new_accumulators({states, p.channels, p.d_state}); }

  SelectiveScanCarry p{};
};

std::array<Tensor, 2> selective_scan_carry(const ForwardArguments& a) {
  Call call("selective_scan_carry", a, "u", a.u, "B", a.B, std::nullopt);
  SelectiveScanCarry& p = call.p;
  const Tensor final_state = call.new_state(),
               dt_sum = call.new_accumulators({call.states, p.channels});
  p.state = final_state.mutable_data_ptr();
  p.dt_sum = dt_sum.mutable_data_ptr();
  carry_forward(call, p);
  return {final_state, dt_sum};
}

std::array<Tensor, 1> selective_scan_carry_backward(const BackwardArguments& a) {
  Call call("selective_scan_carry_backward", a, "dy", a.dy, "C", a.C, a.z);
  const Tensor dinitial_state = call.new_state(),
               dt_sum = call.new_accumulators({call.states, call.p.channels});
  call.p.state = dinitial_state.mutable_data_ptr();
  call.p.dt_sum = dt_sum.mutable_data_ptr();  // which CUDA composes its chunks with
  carry_backward(call, call.p);
  return {dinitial_state};
}

STABLE_TORCH_LIBRARY_IMPL(mambablock, MAMBABLOCK_DISPATCH_KEY, library) {
  library.impl("selective_scan_carry", Boxed<&selective_scan_carry>::call);
  library.impl("selective_scan_carry_backward", Boxed<&selective_scan_carry_backward>::call);
}

}  // namespace
}  // namespace mambablock
