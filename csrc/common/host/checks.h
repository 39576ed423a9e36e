// SPDX-License-Identifier: Apache-2.0
//
// What every operator checks before it reads memory. A failed check is a std::runtime_error, a
// RuntimeError in Python: "op: argument must be <expected>; got <what>".
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/host/boxing.h"

namespace mambablock {

using torch::headeronly::ScalarType;

template <class Expected, class Got>
[[noreturn]] void fail(const char* op, const char* argument, const Expected& expected,
                       const Got& got) {
  std::ostringstream text;
  text << op << ": " << argument << " must be " << expected << "; got " << got;
  throw std::runtime_error(text.str());
}

std::string shape_text(const Tensor& tensor);

// The activation type that `type` is, or an error naming `argument`.
DType dtype_of(const char* op, const char* argument, ScalarType type);

// A size with its name, for messages.
struct Size {
  const char* name;
  int64_t value;
};

// The sizes of a tensor's dimensions, at most four.
struct Sizes {
  Sizes(std::initializer_list<Size> sizes) : count(sizes.size()) {
    std::copy(sizes.begin(), sizes.end(), at);
  }
  Sizes followed_by(std::initializer_list<Size> more) const {
    Sizes all = *this;
    for (const Size& size : more) all.at[all.count++] = size;
    return all;
  }

  Size at[4];
  size_t count;
};

// The checks of one call, all against one device and one activation type.
class [[gnu::visibility("hidden")]] Checks {
 public:
  // `input` sets the device and the activations' type, and has `dimensions` dimensions, the last of
  // which is called `last`.
  Checks(const char* op, const char* argument, const Tensor& input, int64_t dimensions,
         const char* layout, const char* last = "d_inner");

  // An absent tensor passes these three.
  void activation(const char* argument, const OptionalTensor& tensor, const Sizes& sizes) const;
  void parameter(const char* argument, const OptionalTensor& tensor, const Sizes& sizes) const;
  void accumulator(const char* argument, const OptionalTensor& tensor, const Sizes& sizes) const;

  // A parameter of shape (rows, columns) with any number of columns, which it returns.
  Size matrix(const char* argument, const Tensor& tensor, Size rows, const char* columns) const;

  // A state of any of the four types and any number of rows, as many as the batch has without
  // state_indices; returns its type.
  DType state(const char* argument, const Tensor& tensor, const char* layout, Size first,
              Size second, const OptionalTensor& state_indices) const;

  void indices(const char* argument, const Tensor& tensor) const;
  void positive(const Size& size) const;
  // None, for an argument that must be a tensor, arrives as an undefined one.
  void defined(const char* argument, const Tensor& tensor) const;

  DType dtype() const { return dtype_; }
  ScalarType accumulator_type() const { return accumulator_type_; }
  const char* op() const { return op_; }
  const Tensor& input() const { return input_; }
  Size batch() const { return {"batch", input_.size(0)}; }
  Size channels() const { return {last_name_, input_.size(input_.dim() - 1)}; }

 private:
  void device(const char* argument, const Tensor& tensor) const;
  void dimensions(const char* argument, const Tensor& tensor, int64_t count,
                  const char* layout) const;
  void shape(const char* argument, const Tensor& tensor, const Sizes& sizes) const;

  const char* op_;
  const char* input_name_;
  const char* last_name_;
  Tensor input_;
  DType dtype_;
  ScalarType accumulator_type_;
};

// How many states there are: one per row of the batch, or one per packed sequence.
int64_t state_count(const Checks& checks, const OptionalTensor& cu_seqlens);

// A contiguous copy in `type`, or the tensor itself; absent stays absent.
OptionalTensor contiguous_as(const OptionalTensor& tensor, ScalarType type);

inline const void* data_of(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

}  // namespace mambablock
