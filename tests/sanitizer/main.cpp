// SPDX-License-Identifier: Apache-2.0
//
// Runs every kernel of one SIMD level over drawn small shapes and options. Each argument lies in an
// allocation of exactly its size, so that the address sanitizer sees any step outside; each output
// is NaN before and must be finite after.
#include "arguments.h"
#include "causal_conv1d/cpu/kernels.h"
#include "causal_conv1d_update/cpu/kernels.h"
#include "common/cpu/math_arrays.h"
#include "common/cpu/simd.h"
#include "linear/cpu/kernels.h"
#include "mamba_step/cpu/kernels.h"
#include "selective_scan/cpu/kernels.h"
#include "selective_scan_carry/cpu/kernels.h"
#include "selective_state_update/cpu/kernels.h"

namespace mambablock {
namespace {

namespace kernels = MAMBABLOCK_SIMD_LEVEL;

template <class T>
void run_causal_conv1d(Draw& draw, DType dtype) {
  using A = Accumulator<T>;
  Arguments<T> arguments(draw, dtype);
  int64_t batch = draw.one_of({0, 1, 2});
  const int64_t length = draw.one_of({0, 1, 2, 5, 128, 129, 300});
  const int64_t channels = draw.one_of({1, 7, 16, 129, 200}), width = draw.one_of({1, 2, 4, 9});
  arguments.reverse = draw.coin();
  arguments.draw_sequences(batch, length, kConvTimeTile);
  const int64_t states = batch * arguments.sequences * (width - 1) * channels;

  CausalConv1dInputs in{};
  in.dtype = dtype;
  in.batch = batch;
  in.length = length;
  in.channels = channels;
  in.width = width;
  in.sequences = arguments.sequences;
  in.silu = draw.coin();
  in.x = arguments.activation(batch, length, channels);
  in.weight = {arguments.template input<A>(width * channels)};
  in.bias = {arguments.optional_input(channels)};
  in.initial_state = arguments.optional_input(states);
  const RowSegments segments = arguments.row_segments();
  const int64_t items = conv_work_items(in, segments);

  CausalConv1dForward forward{in};
  forward.y = arguments.template rows_output<T>("y", batch, length, channels);
  forward.final_state = arguments.template output<A>("final_state", states);
  arguments.run(&kernels::causal_conv1d_forward, forward, segments, items);

  const int64_t partials = batch * conv_chunks(segments);
  CausalConv1dBackward backward{in};
  backward.dy = arguments.activation(batch, length, channels);
  backward.dfinal_state = arguments.optional_input(states);
  backward.dx = arguments.template rows_output<T>("dx", batch, length, channels);
  if (in.initial_state != nullptr) {
    backward.dinitial_state = arguments.template output<A>("dinitial_state", states);
  }
  backward.dweight_partial = arguments.template output<A>("dweight", partials * width * channels);
  backward.dbias_partial = arguments.template output<A>("dbias", partials * channels);
  arguments.run(&kernels::causal_conv1d_backward, backward, segments, items);
}

template <class T>
void run_selective_scan(Draw& draw, DType dtype) {
  using A = Accumulator<T>;
  Arguments<T> arguments(draw, dtype);
  int64_t batch = draw.one_of({0, 1, 2});
  const int64_t length = draw.one_of({0, 1, 2, 5, 64, 65, 130}), groups = draw.one_of({1, 1, 3});
  const int64_t channels = groups * draw.one_of({1, 7, 16, 65, 130});
  const int64_t d_state = draw.one_of({1, 3, 16});
  arguments.reverse = draw.coin();
  arguments.draw_sequences(batch, length, kScanTimeTile);
  const int64_t states = batch * arguments.sequences * channels * d_state;

  SelectiveScanInputs in{};
  in.dtype = dtype;
  in.batch = batch;
  in.length = length;
  in.channels = channels;
  in.d_state = d_state;
  in.groups = groups;
  in.group_channels = channels / groups;
  in.sequences = arguments.sequences;
  in.delta_softplus = draw.coin();
  in.u = arguments.activation(batch, length, channels);
  in.delta = in.delta_softplus ? arguments.activation(batch, length, channels, -6, 3)
                               : arguments.activation(batch, length, channels, 0, 1);
  in.z = arguments.optional_activation(batch, length, channels);
  in.B = arguments.group_activation(batch, length, groups, d_state);
  in.C = arguments.group_activation(batch, length, groups, d_state);
  in.A = {arguments.template input<A>(channels * d_state, -2, 0)};
  in.D = {arguments.optional_input(channels)};
  in.delta_bias = {draw.coin() ? arguments.template input<A>(channels, 0, 1) : nullptr};
  in.initial_state = arguments.optional_input(states);
  const RowSegments segments = arguments.row_segments();
  const int64_t items = scan_work_items(in);

  A* saved_states = nullptr;
  for (const bool save_states : {false, true}) {
    SelectiveScanForward forward{in};
    forward.y = arguments.template rows_output<T>("y", batch, length, channels);
    forward.final_state = arguments.template output<A>("final_state", states);
    if (save_states) {
      saved_states =
          arguments.template output<A>("saved_states", batch * scan_tiles(in) * d_state * channels);
    }
    forward.saved_states = saved_states;
    arguments.run(&kernels::selective_scan_forward, forward, segments, items);
  }

  const int64_t blocks = scan_blocks_in_group(in);
  SelectiveScanBackward backward{in};
  backward.dy = arguments.activation(batch, length, channels);
  backward.dfinal_state = arguments.optional_input(states);
  backward.saved_states = saved_states;
  backward.du = arguments.template rows_output<T>("du", batch, length, channels);
  backward.ddelta = arguments.template rows_output<T>("ddelta", batch, length, channels);
  if (in.z.data != nullptr) {
    backward.dz = arguments.template rows_output<T>("dz", batch, length, channels);
  }
  if (in.initial_state != nullptr) {
    backward.dinitial_state = arguments.template output<A>("dinitial_state", states);
  }
  for (OutputView* partial : {&backward.dB_partial, &backward.dC_partial}) {
    *partial =
        arguments.template rows_output<A>("dB or dC", blocks * batch, length, groups * d_state);
  }
  backward.dA_partial = arguments.template output<A>("dA", batch * channels * d_state);
  backward.dD_partial = arguments.template output<A>("dD", batch * channels);
  backward.ddelta_bias_partial = arguments.template output<A>("ddelta_bias", batch * channels);
  arguments.run(&kernels::selective_scan_backward, backward, segments, items);

  SelectiveScanCarry carry{in};
  carry.state = arguments.template output<A>("carry", states);
  carry.dt_sum = arguments.template output<A>("dt_sum", batch * arguments.sequences * channels);
  arguments.run(&kernels::selective_scan_carry, carry, segments, items);
  carry.u = backward.dy;
  carry.B = in.C;
  carry.state = arguments.template output<A>("dcarry", states);
  carry.dt_sum = arguments.template output<A>("dt_sum", batch * arguments.sequences * channels);
  arguments.run(&kernels::selective_scan_carry_backward, carry, segments, items);
}

// The rows of a larger state that a batch of updates uses; negative is padding.
std::vector<int64_t> draw_state_rows(Draw& draw, int64_t batch, int64_t rows) {
  std::vector<int64_t> chosen;
  for (int64_t b = 0; b < batch; ++b) chosen.push_back(draw.coin() ? rows - 1 - b : -1);
  return chosen;
}

template <class T, class S>
void run_updates(Draw& draw, DType dtype, DType state_dtype) {
  using A = Accumulator<T>;
  Arguments<T> arguments(draw, dtype);
  const int64_t batch = draw.one_of({0, 1, 3}), rows = batch + draw.one_of({0, 2});
  const int64_t groups = draw.one_of({1, 2}), channels = groups * draw.one_of({1, 7, 16, 65});
  const int64_t width = draw.one_of({1, 2, 4}), d_state = draw.one_of({1, 3, 16, 17});
  const std::vector<int64_t> chosen = draw_state_rows(draw, batch, rows);

  CausalConv1dUpdateParams conv{};
  conv.dtype = dtype;
  conv.state_dtype = state_dtype;
  conv.batch = batch;
  conv.channels = channels;
  conv.width = width;
  conv.silu = draw.coin();
  conv.state = arguments.template input<S>(rows * (width - 1) * channels);
  conv.state_row = (width - 1) * channels;
  conv.state_step = channels;
  conv.state_channel = 1;
  conv.x = arguments.activation(batch, 1, channels);
  conv.weight = {arguments.template input<A>(width * channels)};
  conv.bias = {arguments.optional_input(channels)};
  conv.y = arguments.template rows_output<T>("y", batch, 1, channels);
  arguments.run(&kernels::causal_conv1d_update, conv, chosen.data(), batch * channels);

  SelectiveStateUpdateParams scan{};
  scan.dtype = dtype;
  scan.state_dtype = state_dtype;
  scan.batch = batch;
  scan.channels = channels;
  scan.d_state = d_state;
  scan.groups = groups;
  scan.delta_softplus = draw.coin();
  scan.state = arguments.template input<S>(rows * channels * d_state);
  scan.state_row = channels * d_state;
  scan.state_channel = d_state;
  scan.state_stride = 1;
  scan.u = arguments.activation(batch, 1, channels);
  scan.delta = arguments.activation(batch, 1, channels);
  scan.z = arguments.optional_activation(batch, 1, channels);
  scan.B = arguments.group_activation(batch, 1, groups, d_state);
  scan.C = arguments.group_activation(batch, 1, groups, d_state);
  scan.A = {arguments.template input<A>(channels * d_state, -2, 0)};
  scan.D = {arguments.optional_input(channels)};
  scan.delta_bias = {arguments.optional_input(channels)};
  scan.y = arguments.template rows_output<T>("y", batch, 1, channels);
  arguments.run(&kernels::selective_state_update, scan, chosen.data(), batch * channels);
}

// A linear layer whose output nobody has checked yet.
template <class T, class Y>
LinearParams draw_linear(Arguments<T>& arguments, int64_t rows, int64_t in_features,
                         int64_t out_features, const Accumulator<T>* x) {
  LinearParams p{};
  p.dtype = arguments.dtype;
  p.y_dtype = std::is_same_v<T, Y> ? arguments.dtype : DType::float32;
  p.rows = rows;
  p.in_features = p.x_row = in_features;
  p.out_features = p.y_row = out_features;
  p.x = x;
  p.weight_row = in_features + arguments.draw.one_of({0, 0, 3});
  const int64_t count = (out_features - 1) * p.weight_row + in_features;
  p.weight = arguments.template input<T>(out_features == 0 ? 0 : count);
  p.bias = arguments.optional_input(out_features);
  p.y = arguments.template output<Y>("y of linear", rows * out_features);
  return p;
}

template <class T>
void run_linear(Draw& draw, DType dtype) {
  using A = Accumulator<T>;
  Arguments<T> arguments(draw, dtype);
  const int64_t rows = draw.one_of({0, 1, 2, 3, 7}),
                in_features = draw.one_of({1, 31, 32, 65, 200});
  const int64_t out_features = draw.one_of({0, 1, 8, 19});
  const A* x = arguments.template input<A>(rows * in_features);
  const LinearParams p = draw_linear<T, T>(arguments, rows, in_features, out_features, x);
  const auto kernel = [](const LinearParams& p, int, int64_t begin, int64_t end) {
    kernels::linear(p, begin, end);
  };
  arguments.run(+kernel, p, 0, out_features);
}

template <class T, class S>
void run_mamba_step(Draw& draw, DType dtype, DType state_dtype) {
  using A = Accumulator<T>;
  Arguments<T> arguments(draw, dtype);
  const int64_t batch = draw.one_of({0, 1, 3}), rows = batch + draw.one_of({0, 2});
  const int64_t d_model = draw.one_of({1, 6, 40}), d_inner = draw.one_of({1, 16, 35});
  const int64_t dt_rank = draw.one_of({1, 3}), d_state = draw.one_of({1, 16, 17}), width = 4;
  const int64_t columns = dt_rank + 2 * d_state;
  const DType wide = dtype == DType::float64 ? DType::float64 : DType::float32;
  const std::vector<int64_t> chosen = draw_state_rows(draw, batch, rows);

  MambaStepParams p{};
  const A* x = arguments.template input<A>(batch * d_model);
  p.in_proj = draw_linear<T, A>(arguments, batch, d_model, 2 * d_inner, x);
  A* u = arguments.template output<A>("u", batch * d_inner);
  p.x_proj = draw_linear<T, A>(arguments, batch, d_inner, columns, u);
  const A* selected = static_cast<const A*>(p.x_proj.y);
  p.dt_proj = draw_linear<T, A>(arguments, batch, dt_rank, d_inner, selected);
  p.dt_proj.x_row = columns;
  A* gated = arguments.template output<A>("gated", batch * d_inner);
  p.out_proj = draw_linear<T, T>(arguments, batch, d_inner, d_model, gated);
  const auto parameter = [&](StepParameter& target, int64_t columns) {
    target = {arguments.template input<T>(d_inner * columns, 0, 1), dtype, columns,
              arguments.template output<A>("parameter", d_inner * columns)};
    return target.accumulators;
  };
  const auto view = [](const void* data, int64_t row) { return InputView{data, row, 0, 1}; };
  const auto group = [&](int64_t first) { return GroupedView{selected + first, columns, 0, 0, 1}; };
  const A* xz = static_cast<const A*>(p.in_proj.y);
  p.conv = {.dtype = wide,
            .state_dtype = state_dtype,
            .batch = batch,
            .channels = d_inner,
            .width = width,
            .rows = rows,
            .silu = true,
            .state = arguments.template input<S>(rows * (width - 1) * d_inner),
            .state_row = (width - 1) * d_inner,
            .state_step = d_inner,
            .state_channel = 1,
            .x = view(xz, 2 * d_inner),
            .weight = {parameter(p.parameters[0], width)},
            .bias = {parameter(p.parameters[1], 1)},
            .y = {u, d_inner}};
  p.scan = {.dtype = wide,
            .state_dtype = state_dtype,
            .batch = batch,
            .channels = d_inner,
            .d_state = d_state,
            .groups = 1,
            .rows = rows,
            .delta_softplus = true,
            .state = arguments.template input<S>(rows * d_inner * d_state),
            .state_row = d_inner * d_state,
            .state_channel = d_state,
            .state_stride = 1,
            .u = view(u, d_inner),
            .delta = view(p.dt_proj.y, d_inner),
            .z = view(xz + d_inner, 2 * d_inner),
            .B = group(dt_rank),
            .C = group(dt_rank + d_state),
            .A = {parameter(p.A_log, d_state)},
            .D = {parameter(p.parameters[2], 1)},
            .delta_bias = {parameter(p.parameters[3], 1)},
            .y = {gated, d_inner}};
  p.norms = draw.coin();
  p.norm_eps = 1e-5;
  for (int i = 0; i < 3; ++i) {
    p.norm_sizes[i] = i == 0 ? dt_rank : d_state;
    p.norm_weights[i] = arguments.optional_input(p.norm_sizes[i]);
  }
  const auto kernel = [](const MambaStepParams& p, const int64_t* rows, int64_t, int64_t) {
    kernels::mamba_step_convolve(p, rows, 0, p.conv.channels);
    kernels::mamba_step_select(p, 0, p.x_proj.out_features);
    if (p.norms) kernels::mamba_step_normalize(p, 0, p.conv.batch);
    kernels::mamba_step_scan(p, rows, 0, p.scan.channels);
    kernels::mamba_step_project(p, rows, 0, p.out_proj.out_features);
  };
  arguments.run(+kernel, p, chosen.data(), 1);
}

void run_math(Draw& draw) {
  Arguments<float> arguments(draw, DType::float32);
  for (const int64_t count : {0, 1, 15, 16, 33}) {
    for (int function = 0; function <= int(MathFunction::softplus_derivative); ++function) {
      const float* x = arguments.input<float>(count, 0, 1);
      float* y = arguments.output<float>("math", count);
      kernels::apply_math(MathFunction(function), x, y, count);
    }
  }
}

void run_all() {
  constexpr unsigned draws = 200;
  for (unsigned seed = 0; seed < draws; ++seed) {
    Draw draw(seed);
    for (DType dtype : {DType::float32, DType::bfloat16, DType::float16, DType::float64}) {
      dispatch_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        run_causal_conv1d<T>(draw, dtype);
        run_selective_scan<T>(draw, dtype);
        run_linear<T>(draw, dtype);
        for (DType state : {DType::float32, DType::bfloat16, DType::float16, DType::float64}) {
          dispatch_dtype(state, [&](auto state_type) {
            run_updates<T, decltype(state_type)>(draw, dtype, state);
            run_mamba_step<T, decltype(state_type)>(draw, dtype, state);
          });
        }
      });
    }
    run_math(draw);
  }
}

}  // namespace
}  // namespace mambablock

int main() { mambablock::run_all(); }
