// SPDX-License-Identifier: Apache-2.0
//
// linear: torch.nn.functional.linear for few rows, at the rate at which memory gives the weight.
#include "common/host/checks.h"
#include "linear/backend.h"

namespace mambablock {
namespace {

struct Arguments : ArgumentReader {
  using ArgumentReader::ArgumentReader;
  Tensor x = tensor(), weight = tensor();
  OptionalTensor bias = optional_tensor();
};

std::array<Tensor, 1> linear(const Arguments& a) {
  const Checks checks("linear", "x", a.x, 2, "(rows, in_features)", "in_features");
  const Size in_features{"in_features", a.x.size(1)};
  checks.defined("weight", a.weight);
  if (a.weight.dim() != 2) {
    fail("linear", "weight", "(out_features, in_features)", shape_text(a.weight));
  }
  const Size out_features{"out_features", a.weight.size(0)};
  checks.activation("weight", a.weight, {out_features, in_features});
  checks.parameter("bias", a.bias, {out_features});
  const OptionalTensor x = contiguous_as(a.x, checks.accumulator_type()),
                       bias = contiguous_as(a.bias, checks.accumulator_type());
  const Tensor weight = a.weight.stride(1) == 1 ? a.weight : torch::stable::contiguous(a.weight);
  const Tensor y = torch::stable::new_empty(a.x, {a.x.size(0), out_features.value});
  run_linear({
      .dtype = checks.dtype(),
      .y_dtype = checks.dtype(),
      .rows = a.x.size(0),
      .in_features = in_features.value,
      .out_features = out_features.value,
      .x = data_of(x),
      .x_row = in_features.value,
      .weight = weight.const_data_ptr(),
      .weight_row = weight.stride(0),
      .bias = data_of(bias),
      .y = y.mutable_data_ptr(),
      .y_row = out_features.value,
  });
  return {y};
}

STABLE_TORCH_LIBRARY_IMPL(mambablock, MAMBABLOCK_DISPATCH_KEY, library) {
  library.impl("linear", Boxed<&linear>::call);
}

}  // namespace
}  // namespace mambablock
