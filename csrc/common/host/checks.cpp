// SPDX-License-Identifier: Apache-2.0
#include "common/host/checks.h"

namespace mambablock {
namespace {

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    default:
      return torch::headeronly::toString(type);
  }
}

std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another device";
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() &&
         (a.is_cpu() || a.get_device_index() == b.get_device_index());
}

}  // namespace

std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

DType dtype_of(const char* op, const char* argument, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::Double:
      return DType::float64;
    default:
      fail(op, argument, "float32, bfloat16, float16 or float64", dtype_name(type));
  }
}

Checks::Checks(const char* op, const char* argument, const Tensor& input, int64_t dimensions,
               const char* layout, const char* last)
    : op_(op), input_name_(argument), last_name_(last), input_(input) {
  defined(argument, input);
  this->dimensions(argument, input, dimensions, layout);
  dtype_ = dtype_of(op, argument, input.scalar_type());
  accumulator_type_ = dtype_ == DType::float64 ? ScalarType::Double : ScalarType::Float;
  positive(channels());
}

void Checks::defined(const char* argument, const Tensor& tensor) const {
  if (!tensor.defined()) fail(op_, argument, "a tensor", "None");
}

void Checks::positive(const Size& size) const {
  if (size.value < 1) fail(op_, size.name, "at least 1", size.value);
}

void Checks::device(const char* argument, const Tensor& tensor) const {
  defined(argument, tensor);
  if (!same_device(input_, tensor)) {
    fail(op_, argument, "on " + device_text(input_) + " as " + input_name_, device_text(tensor));
  }
}

void Checks::dimensions(const char* argument, const Tensor& tensor, int64_t count,
                        const char* layout) const {
  if (tensor.dim() != count) fail(op_, argument, layout, shape_text(tensor));
}

void Checks::shape(const char* argument, const Tensor& tensor, const Sizes& sizes) const {
  bool same = tensor.dim() == int64_t(sizes.count);
  for (size_t i = 0; same && i < sizes.count; ++i) same = tensor.size(i) == sizes.at[i].value;
  if (same) return;
  std::string expected;
  for (size_t i = 0; i < sizes.count; ++i) {
    expected += (i > 0 ? ", " : "") + std::string(sizes.at[i].name) + "=" +
                std::to_string(sizes.at[i].value);
  }
  fail(op_, argument, "(" + expected + ")", shape_text(tensor));
}

void Checks::activation(const char* argument, const OptionalTensor& tensor,
                        const Sizes& sizes) const {
  if (!tensor) return;
  device(argument, *tensor);
  if (tensor->scalar_type() != input_.scalar_type()) {
    fail(op_, argument, std::string(dtype_name(input_.scalar_type())) + " as " + input_name_,
         dtype_name(tensor->scalar_type()));
  }
  shape(argument, *tensor, sizes);
}

void Checks::parameter(const char* argument, const OptionalTensor& tensor,
                       const Sizes& sizes) const {
  if (!tensor) return;
  device(argument, *tensor);
  const ScalarType type = tensor->scalar_type(), activations = input_.scalar_type();
  if (type != activations && type != ScalarType::Float) {
    // The type that is computed in comes first.
    std::string expected = dtype_name(accumulator_type_);
    const ScalarType other =
        accumulator_type_ == ScalarType::Float ? activations : ScalarType::Float;
    if (other != accumulator_type_) expected += std::string(" or ") + dtype_name(other);
    fail(op_, argument, expected, dtype_name(type));
  }
  shape(argument, *tensor, sizes);
}

void Checks::accumulator(const char* argument, const OptionalTensor& tensor,
                         const Sizes& sizes) const {
  if (!tensor) return;
  device(argument, *tensor);
  if (tensor->scalar_type() != accumulator_type_) {
    fail(op_, argument,
         std::string(dtype_name(accumulator_type_)) + " for " + input_name_ + " in " +
             dtype_name(input_.scalar_type()),
         dtype_name(tensor->scalar_type()));
  }
  shape(argument, *tensor, sizes);
}

Size Checks::matrix(const char* argument, const Tensor& tensor, Size rows,
                    const char* columns) const {
  device(argument, tensor);
  if (tensor.dim() != 2) {
    fail(op_, argument, std::string("(") + rows.name + ", " + columns + ")", shape_text(tensor));
  }
  const Size size{columns, tensor.size(1)};
  parameter(argument, tensor, {rows, size});
  positive(size);
  return size;
}

DType Checks::state(const char* argument, const Tensor& tensor, const char* layout, Size first,
                    Size second, const OptionalTensor& state_indices) const {
  device(argument, tensor);
  const DType dtype = dtype_of(op_, argument, tensor.scalar_type());
  dimensions(argument, tensor, 3, layout);
  const Size rows{"rows", tensor.size(0)};
  shape(argument, tensor, {rows, first, second});
  if (state_indices) {
    indices("state_indices", *state_indices);
    shape("state_indices", *state_indices, {batch()});
  } else if (rows.value != batch().value) {
    fail(op_, argument, "of batch=" + std::to_string(batch().value) + " rows", rows.value);
  }
  return dtype;
}

void Checks::indices(const char* argument, const Tensor& tensor) const {
  device(argument, tensor);
  const ScalarType type = tensor.scalar_type();
  if (type != ScalarType::Int && type != ScalarType::Long) {
    fail(op_, argument, "int32 or int64", dtype_name(type));
  }
  dimensions(argument, tensor, 1, "one-dimensional");
}

int64_t state_count(const Checks& checks, const OptionalTensor& cu_seqlens) {
  const int64_t batch = checks.batch().value;
  if (!cu_seqlens) return batch;
  checks.indices("cu_seqlens", *cu_seqlens);
  if (cu_seqlens->size(0) < 1) {
    fail(checks.op(), "cu_seqlens", "of at least one value", shape_text(*cu_seqlens));
  }
  if (batch != 1) fail(checks.op(), "batch", "1 with cu_seqlens", batch);
  return cu_seqlens->size(0) - 1;
}

OptionalTensor contiguous_as(const OptionalTensor& tensor, ScalarType type) {
  if (!tensor) return std::nullopt;
  const Tensor converted =
      tensor->scalar_type() == type ? *tensor : torch::stable::to(*tensor, type);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

}  // namespace mambablock
