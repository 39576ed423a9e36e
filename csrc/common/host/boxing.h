// SPDX-License-Identifier: Apache-2.0
//
// Operators take their arguments as one struct, which lists them once, in the schema's order.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

namespace mambablock {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What such a struct derives from: its members' initializers read the dispatcher's stack.
class ArgumentReader {
 public:
  explicit ArgumentReader(StableIValue*& next) : next_(next) {}

 protected:
  Tensor tensor() { return read<Tensor>(); }
  OptionalTensor optional_tensor() { return read<OptionalTensor>(); }
  bool boolean() { return read<bool>(); }
  std::optional<double> optional_number() { return read<std::optional<double>>(); }

  StableIValue*& next_;

 private:
  template <class T>
  T read() {
    return torch::stable::detail::to<T>(*next_++);
  }
};

// Boxed<&function>::call is `function` as the dispatcher calls it.
template <auto function>
struct Boxed;

template <class Arguments, size_t Count, std::array<Tensor, Count> (*function)(const Arguments&)>
struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
    StableIValue* next = stack;
    const Arguments arguments(next);
    STD_TORCH_CHECK(uint64_t(next - stack) == inputs && outputs == Count,
                    "mambablock: an operator's arguments must be those of its schema");
    const std::array<Tensor, Count> results = function(arguments);
    for (size_t i = 0; i < Count; ++i) stack[i] = torch::stable::detail::from(results[i]);
  }
};

}  // namespace mambablock
