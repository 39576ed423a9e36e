// SPDX-License-Identifier: Apache-2.0
//
// mamba_step: one decoding step of a whole Mamba block (Gu & Dao 2023, arXiv:2312.00752, figure 3).
#include <memory>
#include <vector>

#include "common/host/views.h"
#include "mamba_step/backend.h"

namespace mambablock {
namespace {

struct Arguments : ArgumentReader {
  using ArgumentReader::ArgumentReader;
  Tensor conv_state = tensor(), ssm_state = tensor(), x = tensor(), in_proj_weight = tensor();
  OptionalTensor in_proj_bias = optional_tensor();
  Tensor conv_weight = tensor();
  OptionalTensor conv_bias = optional_tensor();
  Tensor x_proj_weight = tensor(), dt_proj_weight = tensor();
  OptionalTensor dt_proj_bias = optional_tensor();
  Tensor A_log = tensor(), D = tensor(), out_proj_weight = tensor();
  OptionalTensor out_proj_bias = optional_tensor(), dt_norm_weight = optional_tensor(),
                 B_norm_weight = optional_tensor(), C_norm_weight = optional_tensor();
  std::optional<double> norm_eps = optional_number();
  OptionalTensor state_indices = optional_tensor();
};

// A checked call, with the memory between its stages.
class Call {
 public:
  explicit Call(const Arguments& a)
      : checks("mamba_step", "x", a.x, 2, "(batch, d_model)", "d_model"),
        batch_(checks.batch().value),
        y(torch::stable::new_empty(a.x, {batch_, checks.channels().value})) {
    const Size d_model = checks.channels();
    checks.defined("A_log", a.A_log);
    if (a.A_log.dim() != 2) fail(checks.op(), "A_log", "(d_inner, d_state)", shape_text(a.A_log));
    const Size d_inner{"d_inner", a.A_log.size(0)};
    const Size d_state = checks.matrix("A_log", a.A_log, d_inner, "d_state");
    const Size dt_rank = checks.matrix("dt_proj_weight", a.dt_proj_weight, d_inner, "dt_rank");
    const Size width = checks.matrix("conv_weight", a.conv_weight, d_inner, "d_conv");
    const Size both{"2 * d_inner", 2 * d_inner.value};
    const Size selected{"dt_rank + 2 * d_state", dt_rank.value + 2 * d_state.value};
    checks.positive(d_inner);
    checks.activation("in_proj_weight", a.in_proj_weight, {both, d_model});
    checks.parameter("in_proj_bias", a.in_proj_bias, {both});
    checks.parameter("conv_bias", a.conv_bias, {d_inner});
    checks.activation("x_proj_weight", a.x_proj_weight, {selected, d_inner});
    checks.activation("dt_proj_weight", a.dt_proj_weight, {d_inner, dt_rank});
    checks.parameter("dt_proj_bias", a.dt_proj_bias, {d_inner});
    checks.parameter("D", a.D, {d_inner});
    checks.activation("out_proj_weight", a.out_proj_weight, {d_model, d_inner});
    checks.parameter("out_proj_bias", a.out_proj_bias, {d_model});
    checks.parameter("dt_norm_weight", a.dt_norm_weight, {dt_rank});
    checks.parameter("B_norm_weight", a.B_norm_weight, {d_state});
    checks.parameter("C_norm_weight", a.C_norm_weight, {d_state});
    const DType conv_dtype =
        checks.state("conv_state", a.conv_state, "(rows, d_conv - 1, d_inner)",
                     {"d_conv - 1", width.value - 1}, d_inner, a.state_indices);
    const DType ssm_dtype = checks.state("ssm_state", a.ssm_state, "(rows, d_inner, d_state)",
                                         d_inner, d_state, a.state_indices);
    if (a.conv_state.size(0) != a.ssm_state.size(0)) {
      fail(checks.op(), "ssm_state",
           "of as many rows as conv_state=" + std::to_string(a.conv_state.size(0)),
           a.ssm_state.size(0));
    }
    const int64_t channels = d_inner.value, columns = selected.value;
    void *xz = scratch(batch_ * 2 * channels), *u = scratch(batch_ * channels),
         *dt_B_C = scratch(batch_ * columns), *delta = scratch(batch_ * channels),
         *gated = scratch(batch_ * channels);
    p.in_proj = linear(accumulators(a.x), a.in_proj_weight, a.in_proj_bias, xz);
    p.x_proj = linear(u, a.x_proj_weight, {}, dt_B_C);
    p.dt_proj = linear(dt_B_C, a.dt_proj_weight, {}, delta);
    p.dt_proj.x_row = columns;
    p.out_proj = linear(gated, a.out_proj_weight, a.out_proj_bias, y.mutable_data_ptr());
    p.out_proj.y_dtype = checks.dtype();

    const DType dtype = dtype_of(checks.op(), "x", checks.accumulator_type());
    const auto row_of = [&](const void* data, int64_t row) { return InputView{data, row, 0, 1}; };
    p.conv = {.dtype = dtype,
              .state_dtype = conv_dtype,
              .batch = batch_,
              .channels = channels,
              .width = width.value,
              .rows = a.conv_state.size(0),
              .silu = true,
              .state = a.conv_state.mutable_data_ptr(),
              .state_row = a.conv_state.stride(0),
              .state_step = a.conv_state.stride(1),
              .state_channel = a.conv_state.stride(2),
              .x = row_of(xz, 2 * channels),
              .weight = parameter(p.parameters[0], a.conv_weight),
              .bias = parameter(p.parameters[1], a.conv_bias),
              .y = {u, channels}};
    const auto group_of = [&](int64_t first) {
      const void* data = element(dt_B_C, first);
      return GroupedView{data, columns, 0, 0, 1};
    };
    p.scan = {.dtype = dtype,
              .state_dtype = ssm_dtype,
              .batch = batch_,
              .channels = channels,
              .d_state = d_state.value,
              .groups = 1,
              .rows = a.ssm_state.size(0),
              .delta_softplus = true,
              .state = a.ssm_state.mutable_data_ptr(),
              .state_row = a.ssm_state.stride(0),
              .state_channel = a.ssm_state.stride(1),
              .state_stride = a.ssm_state.stride(2),
              .u = row_of(u, channels),
              .delta = row_of(delta, channels),
              .z = row_of(element(xz, channels), 2 * channels),
              .B = group_of(dt_rank.value),
              .C = group_of(dt_rank.value + d_state.value),
              .A = parameter(p.A_log, a.A_log, true),
              .D = parameter(p.parameters[2], a.D),
              .delta_bias = parameter(p.parameters[3], a.dt_proj_bias),
              .y = {gated, channels}};
    p.norms = a.norm_eps.has_value();
    p.norm_eps = a.norm_eps.value_or(0);
    const Size sizes[] = {dt_rank, d_state, d_state};
    const OptionalTensor weights[] = {a.dt_norm_weight, a.B_norm_weight, a.C_norm_weight};
    for (int i = 0; i < 3; ++i) {
      p.norm_sizes[i] = sizes[i].value;
      p.norm_weights[i] = weights[i] ? accumulators(weights[i]) : nullptr;
    }
  }

  Checks checks;
  MambaStepParams p{};

 private:
  const void* accumulators(const OptionalTensor& tensor) {
    kept_.push_back(contiguous_as(tensor, checks.accumulator_type()));
    return data_of(kept_.back());
  }

  // Memory of so many accumulators.
  void* scratch(int64_t count) {
    scratch_.push_back(std::make_unique_for_overwrite<double[]>(count));
    return scratch_.back().get();
  }

  void* element(void* data, int64_t index) const {
    const int64_t size = checks.accumulator_type() == ScalarType::Double ? 8 : 4;
    return static_cast<char*>(data) + index * size;
  }

  LinearParams linear(const void* x, const Tensor& weight, const OptionalTensor& bias,
                      void* y_data) {
    const Tensor rows = weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight);
    kept_.push_back(rows);
    return {.dtype = checks.dtype(),
            .y_dtype = dtype_of(checks.op(), "x", checks.accumulator_type()),
            .rows = batch_,
            .in_features = rows.size(1),
            .out_features = rows.size(0),
            .x = x,
            .x_row = rows.size(1),
            .weight = rows.const_data_ptr(),
            .weight_row = rows.stride(0),
            .bias = bias ? accumulators(bias) : nullptr,
            .y = y_data,
            .y_row = rows.size(0)};
  }

  // What the kernels read of a parameter: its own memory, or accumulators that the step writes.
  const void* parameter(StepParameter& target, const OptionalTensor& tensor,
                        bool computed = false) {
    if (!tensor) return nullptr;
    kept_.push_back(contiguous_as(tensor, tensor->scalar_type()));
    const Tensor source = *kept_.back();
    target = {source.const_data_ptr(), dtype_of(checks.op(), "parameters", source.scalar_type()),
              source.numel() / source.size(0), nullptr};
    if (!computed && source.scalar_type() == checks.accumulator_type()) return target.data;
    return target.accumulators = scratch(source.numel());
  }

  int64_t batch_;
  std::vector<OptionalTensor> kept_;
  std::vector<std::unique_ptr<double[]>> scratch_;

 public:
  Tensor y;
};

std::array<Tensor, 1> mamba_step(const Arguments& a) {
  const Call call(a);
  run_step(call.checks, call.p, a.state_indices);
  return {call.y};
}

STABLE_TORCH_LIBRARY_IMPL(mambablock, MAMBABLOCK_DISPATCH_KEY, library) {
  library.impl("mamba_step", Boxed<&mamba_step>::call);
}

}  // namespace
}  // namespace mambablock
