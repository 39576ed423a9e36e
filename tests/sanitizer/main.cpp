// SPDX-License-Identifier: Apache-2.0
//
// Runs every kernel of one SIMD level over drawn small shapes and options. Each argument lies in an
// allocation of exactly its size, so that the address sanitizer sees any step outside; each output
// is NaN before and must be finite after.
#include <cmath>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "causal_conv1d/cpu/kernels.h"
#include "causal_conv1d_update/cpu/kernels.h"
#include "common/cpu/math_arrays.h"
#include "common/cpu/simd.h"
#include "selective_scan/cpu/kernels.h"
#include "selective_scan_carry/cpu/kernels.h"
#include "selective_state_update/cpu/kernels.h"

namespace mambablock {
namespace {

namespace kernels = MAMBABLOCK_SIMD_LEVEL;

class Draw {
 public:
  explicit Draw(unsigned seed) : generator_(seed) {}
  int64_t one_of(std::initializer_list<int64_t> values) {
    return values.begin()[generator_() % values.size()];
  }
  bool coin() { return generator_() % 2 == 0; }
  float uniform(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(generator_);
  }

 private:
  std::mt19937 generator_;
};

// The arguments of one call, whose activations are of type T.
template <class T>
class Arguments {
 public:
  using A = Accumulator<T>;

  Arguments(Draw& draw, DType dtype) : draw(draw), dtype(dtype) {}

  template <class E>
  E* input(int64_t count, float low = -1, float high = 1) {
    E* data = allocate<E>(count);
    for (int64_t i = 0; i < count; ++i) {
      data[i] = from_accumulator<E>(draw.uniform(low, high));
    }
    return data;
  }

  A* optional_input(int64_t count) { return draw.coin() ? input<A>(count) : nullptr; }

  template <class E>
  E* output(const char* name, int64_t count) {
    E* data = allocate<E>(count);
    const auto nan = std::numeric_limits<Accumulator<E>>::quiet_NaN();
    for (int64_t i = 0; i < count; ++i) data[i] = from_accumulator<E>(nan);
    checks_.push_back([=] {
      for (int64_t i = 0; i < count; ++i) {
        if (std::isfinite(to_accumulator(data[i]))) continue;
        throw std::runtime_error(std::string(name) + " is not finite at element " +
                                 std::to_string(i) + " of " + std::to_string(count));
      }
    });
    return data;
  }

  // A (batch, time, channel) input: its steps contiguous, its channels contiguous, or neither.
  InputView activation(int64_t batch, int64_t length, int64_t channels, float low = -1,
                       float high = 1) {
    if (draw.one_of({0, 0, 1})) {
      const T* data = input<T>(batch * length * channels, low, high);
      return {first_step(data, length, 1), length * channels, reverse ? -1 : 1, length};
    }
    const int64_t spacing = draw.one_of({1, 1, 2});
    const int64_t step = channels * spacing;
    const int64_t last = channels == 0 ? 0 : spacing - 1;
    // The spacing after the very last channel is not allocated.
    const int64_t count = batch * length * step;
    const T* data = input<T>(count == 0 ? 0 : count - last, low, high);
    return {first_step(data, length, step), length * step, reverse ? -step : step, spacing};
  }

  InputView optional_activation(int64_t batch, int64_t length, int64_t channels) {
    return draw.coin() ? activation(batch, length, channels) : InputView{};
  }

  GroupedView group_activation(int64_t batch, int64_t length, int64_t groups, int64_t d_state) {
    const int64_t step = groups * d_state;
    const T* data = input<T>(batch * length * step);
    return {first_step(data, length, step), length * step, reverse ? -step : step, d_state, 1};
  }

  template <class E>
  OutputView rows_output(const char* name, int64_t batch, int64_t length, int64_t channels) {
    E* data = output<E>(name, batch * length * channels);
    return {const_cast<E*>(first_step(data, length, channels)), length * channels,
            reverse ? -channels : channels};
  }

  // One sequence, or some packed into one row, empty ones among them.
  void draw_sequences(int64_t& batch, int64_t length, int64_t tile) {
    if (draw.coin()) {
      sequences = 1;
      segments = time_segments({0, length}, tile);
      return;
    }
    batch = 1;
    sequences = 4;
    segments = time_segments({0, 0, length / 3, length - length / 5, length}, tile);
  }

  RowSegments row_segments() const { return {segments.data(), int64_t(segments.size())}; }

  // A kernel's work items in two calls, then the check of what it wrote.
  template <class P, class Q>
  void run(void (*kernel)(const P&, Q, int64_t, int64_t), const P& params, Q plan, int64_t items) {
    kernel(params, plan, items / 2, items);
    kernel(params, plan, 0, items / 2);
    for (const auto& check : checks_) check();
    checks_.clear();
  }

  Draw& draw;
  DType dtype;
  bool reverse = false;
  std::vector<Segment> segments;
  int64_t sequences = 1;

 private:
  template <class E>
  E* allocate(int64_t count) {
    const std::shared_ptr<E[]> memory(new E[count]);
    memory_.push_back(memory);
    return memory.get();
  }

  template <class E>
  const E* first_step(const E* data, int64_t length, int64_t step) const {
    return reverse && length > 0 ? data + (length - 1) * step : data;
  }

  std::vector<std::shared_ptr<void>> memory_;
  std::vector<std::function<void()>> checks_;
};

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
  in.weight = arguments.template input<A>(width * channels);
  in.bias = arguments.optional_input(channels);
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
  in.A = arguments.template input<A>(channels * d_state, -2, 0);
  in.D = arguments.optional_input(channels);
  in.delta_bias = draw.coin() ? arguments.template input<A>(channels, 0, 1) : nullptr;
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
  conv.weight = arguments.template input<A>(width * channels);
  conv.bias = arguments.optional_input(channels);
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
  scan.A = arguments.template input<A>(channels * d_state, -2, 0);
  scan.D = arguments.optional_input(channels);
  scan.delta_bias = arguments.optional_input(channels);
  scan.y = arguments.template rows_output<T>("y", batch, 1, channels);
  arguments.run(&kernels::selective_state_update, scan, chosen.data(), batch * channels);
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
        for (DType state : {DType::float32, DType::bfloat16, DType::float16, DType::float64}) {
          dispatch_dtype(state, [&](auto state_type) {
            run_updates<T, decltype(state_type)>(draw, dtype, state);
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
