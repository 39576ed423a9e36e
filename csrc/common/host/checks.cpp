// SPDX-License-Identifier: Apache-2.0
#include "common/host/checks.h"

#include <algorithm>

namespace mambablock {

std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

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

namespace {

std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another device";
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() &&
         (a.is_cpu() || a.get_device_index() == b.get_device_index());
}

}  // namespace

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
               const char* layout)
    : op_(op), input_name_(argument), input_(input), activation_type_(input.scalar_type()) {
  if (input.dim() != dimensions) fail(op, argument, layout, shape_text(input));
  dtype_ = dtype_of(op, argument, activation_type_);
  accumulator_type_ = dtype_ == DType::float64 ? ScalarType::Double : ScalarType::Float;
}

void Checks::shape(const char* argument, const Tensor& tensor,
                   std::initializer_list<Size> sizes) const {
  bool same = tensor.dim() == int64_t(sizes.size());
  std::string expected;
  int64_t i = 0;
  for (const Size& size : sizes) {
    same = same && tensor.size(i) == size.value;
    expected += (i++ > 0 ? ", " : "") + std::string(size.name) + "=" + std::to_string(size.value);
  }
  if (!same) fail(op_, argument, "(" + expected + ")", shape_text(tensor));
}

void Checks::positive(const char* what, int64_t value) const {
  if (value < 1) fail(op_, what, "at least 1", value);
}

void Checks::device(const char* argument, const Tensor& tensor) const {
  if (!same_device(input_, tensor)) {
    fail(op_, argument, "on " + device_text(input_) + " as " + input_name_, device_text(tensor));
  }
}

void Checks::activation(const char* argument, const Tensor& tensor) const {
  device(argument, tensor);
  if (tensor.scalar_type() != activation_type_) {
    fail(op_, argument, std::string(dtype_name(activation_type_)) + " as " + input_name_,
         dtype_name(tensor.scalar_type()));
  }
}

void Checks::parameter(const char* argument, const Tensor& tensor) const {
  device(argument, tensor);
  const ScalarType type = tensor.scalar_type();
  if (type != activation_type_ && type != accumulator_type_) {
    std::string expected = dtype_name(accumulator_type_);
    if (activation_type_ != accumulator_type_) {
      expected += std::string(" or ") + dtype_name(activation_type_);
    }
    fail(op_, argument, expected, dtype_name(type));
  }
}

void Checks::accumulator(const char* argument, const Tensor& tensor) const {
  device(argument, tensor);
  if (tensor.scalar_type() != accumulator_type_) {
    fail(op_, argument,
         std::string(dtype_name(accumulator_type_)) + " for " + input_name_ + " in " +
             dtype_name(activation_type_),
         dtype_name(tensor.scalar_type()));
  }
}

DType Checks::state(const char* argument, const Tensor& tensor) const {
  device(argument, tensor);
  return dtype_of(op_, argument, tensor.scalar_type());
}

void Checks::indices(const char* argument, const Tensor& tensor) const {
  device(argument, tensor);
  const ScalarType type = tensor.scalar_type();
  if (type != ScalarType::Int && type != ScalarType::Long) {
    fail(op_, argument, "int32 or int64", dtype_name(type));
  }
  if (tensor.dim() != 1) fail(op_, argument, "one-dimensional", shape_text(tensor));
}

int64_t state_count(const Checks& checks, const std::optional<Tensor>& cu_seqlens, int64_t batch) {
  if (!cu_seqlens) return batch;
  checks.indices("cu_seqlens", *cu_seqlens);
  if (cu_seqlens->size(0) < 1) {
    fail(checks.op(), "cu_seqlens", "of at least one value", shape_text(*cu_seqlens));
  }
  if (batch != 1) fail(checks.op(), "batch", "1 with cu_seqlens", batch);
  return cu_seqlens->size(0) - 1;
}

void check_state_rows(const Checks& checks, const std::optional<Tensor>& state_indices,
                      int64_t batch, int64_t rows) {
  if (state_indices) {
    checks.indices("state_indices", *state_indices);
    checks.shape("state_indices", *state_indices, {{"batch", batch}});
  } else if (rows != batch) {
    fail(checks.op(), "state", "of batch=" + std::to_string(batch) + " rows", rows);
  }
}

bool movable_in_packs(const void* data, int64_t element_size, int64_t count,
                      std::initializer_list<int64_t> strides) {
  int64_t bytes = reinterpret_cast<intptr_t>(data);
  for (const int64_t stride : strides) bytes |= stride * element_size;
  return count % kPack == 0 && bytes % std::min<int64_t>(16, kPack * element_size) == 0;
}

Strided3 strided_input(const std::optional<Tensor>& tensor, bool reverse) {
  if (!tensor) return {};
  Strided3 input{tensor->const_data_ptr(), tensor->stride(0), tensor->stride(1), tensor->stride(2)};
  if (reverse && tensor->numel() > 0) {
    input.data = static_cast<const char*>(input.data) +
                 (tensor->size(1) - 1) * input.time * int64_t(tensor->element_size());
    input.time = -input.time;
  }
  const auto movable = [&](int64_t count, int64_t stride) {
    return movable_in_packs(input.data, tensor->element_size(), count, {input.batch, stride});
  };
  if (input.channel == 1 && movable(tensor->size(2), input.time)) {
    input.packs = Packs::kChannels;
  } else if (input.time == 1 && movable(tensor->size(1), input.channel)) {
    input.packs = Packs::kSteps;
  }
  return input;
}

Strided3 strided_step_input(const std::optional<Tensor>& tensor) {
  if (!tensor) return {};
  return {tensor->const_data_ptr(), tensor->stride(0), 0, tensor->stride(1)};
}

Strided3Out strided_output(const Tensor& tensor, bool reverse) {
  const Strided3 view = strided_input(tensor, reverse);
  return {const_cast<void*>(view.data), view.batch, view.time, view.packs == Packs::kChannels};
}

std::optional<Tensor> contiguous_as(const std::optional<Tensor>& tensor, ScalarType type) {
  if (!tensor) return std::nullopt;
  const Tensor converted =
      tensor->scalar_type() == type ? *tensor : torch::stable::to(*tensor, type);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

}  // namespace mambablock
