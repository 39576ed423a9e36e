// SPDX-License-Identifier: Apache-2.0
//
// What every op checks before it reads memory. A failed check is a std::runtime_error, a
// RuntimeError in Python: "op: argument must be <expected>; got <what>".
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/views.h"

namespace mambablock {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Expected, class Got>
[[noreturn]] void fail(const char* op, const char* argument, const Expected& expected,
                       const Got& got) {
  std::ostringstream text;
  text << op << ": " << argument << " must be " << expected << "; got " << got;
  throw std::runtime_error(text.str());
}

std::string shape_text(const Tensor& tensor);
const char* dtype_name(ScalarType type);

// The activation type that `type` is, or an error naming `argument`.
DType dtype_of(const char* op, const char* argument, ScalarType type);

// A size with its name, for messages.
struct Size {
  const char* name;
  int64_t value;
};

// The checks of one call of one op, all against one device and one activation type.
class [[gnu::visibility("hidden")]] Checks {
 public:
  // `input` sets the device and the activations' type, and has `dimensions` dimensions.
  Checks(const char* op, const char* argument, const Tensor& input, int64_t dimensions,
         const char* layout);

  void shape(const char* argument, const Tensor& tensor, std::initializer_list<Size> sizes) const;
  void positive(const char* what, int64_t value) const;
  void activation(const char* argument, const Tensor& tensor) const;
  void parameter(const char* argument, const Tensor& tensor) const;  // accumulator's type too
  void accumulator(const char* argument, const Tensor& tensor) const;
  void indices(const char* argument, const Tensor& tensor) const;
  void device(const char* argument, const Tensor& tensor) const;

  // The type of a state that may have any of the four types.
  DType state(const char* argument, const Tensor& tensor) const;

  DType dtype() const { return dtype_; }
  ScalarType activation_type() const { return activation_type_; }
  ScalarType accumulator_type() const { return accumulator_type_; }
  const char* op() const { return op_; }
  const Tensor& input() const { return input_; }

 private:
  const char* op_;
  const char* input_name_;
  Tensor input_;
  DType dtype_;
  ScalarType activation_type_, accumulator_type_;
};

// How many states there are: one per row of the batch, or one per packed sequence.
int64_t state_count(const Checks& checks, const std::optional<Tensor>& cu_seqlens, int64_t batch);

// state_indices, where given, picks one of the state's rows for every row of the batch; else there
// are as many rows.
void check_state_rows(const Checks& checks, const std::optional<Tensor>& state_indices,
                      int64_t batch, int64_t rows);

// An argument of the updates, of shape (batch, channel), is one of a single time step.
Strided3 strided_step_input(const std::optional<Tensor>& tensor);
Strided3 strided_input(const std::optional<Tensor>& tensor, bool reverse);
Strided3Out strided_output(const Tensor& tensor, bool reverse);

// Whether `count` neighbours at any multiples of these strides, given in elements, can be moved in
// packs, of 16 bytes at most.
bool movable_in_packs(const void* data, int64_t element_size, int64_t count,
                      std::initializer_list<int64_t> strides);

// A contiguous copy in `type`, or the tensor itself; undefined stays undefined.
std::optional<Tensor> contiguous_as(const std::optional<Tensor>& tensor, ScalarType type);

// The sum of `count` partial sums, which lie one after the other in `partials`, always in that
// order; in the shape and type of `like`. Each device has its own.
Tensor sum_partials(const Tensor& partials, int64_t count, const Tensor& like);

inline const void* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

}  // namespace mambablock
