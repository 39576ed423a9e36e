// SPDX-License-Identifier: Apache-2.0
//
// The arguments of a kernel: drawn, each in an allocation of exactly its size.
#pragma once

#include <cmath>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/convert.h"
#include "common/time_segments.h"
#include "common/views.h"

namespace mambablock {
namespace {

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

}  // namespace
}  // namespace mambablock
