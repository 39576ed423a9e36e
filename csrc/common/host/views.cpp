// SPDX-License-Identifier: Apache-2.0
#include "common/host/views.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>

namespace mambablock {
namespace {

// From the tensor's data to the first step that is visited, in bytes.
int64_t first_step(const Tensor& tensor, bool reverse) {
  if (!reverse || tensor.numel() == 0) return 0;
  return (tensor.size(1) - 1) * tensor.stride(1) * int64_t(tensor.element_size());
}

// Whether packs of `count` contiguous neighbours are aligned at all multiples of the strides.
bool packs_aligned(const void* data, const Tensor& tensor, int64_t count,
                   std::initializer_list<int64_t> strides) {
  const int64_t element = tensor.element_size();
  int64_t bytes = reinterpret_cast<intptr_t>(data);
  for (const int64_t stride : strides) bytes |= stride * element;
  return count % kPack == 0 && bytes % std::min<int64_t>(16, kPack * element) == 0;
}

}  // namespace

InputView input_view(const OptionalTensor& tensor, bool reverse, int64_t group_channels) {
  if (!tensor) return {};
  const void* data =
      static_cast<const char*>(tensor->const_data_ptr()) + first_step(*tensor, reverse);
  const int64_t batch = tensor->stride(0), time = tensor->stride(1), channel = tensor->stride(2);
  PackDimension packs = PackDimension::kNone;
  if (channel == 1 && packs_aligned(data, *tensor, group_channels, {batch, time})) {
    packs = PackDimension::kChannels;
  } else if (time == 1 && !reverse &&
             packs_aligned(data, *tensor, tensor->size(1), {batch, channel})) {
    packs = PackDimension::kSteps;
  }
  return {data, batch, reverse ? -time : time, channel, packs};
}

OutputView output_view(const Tensor& tensor, bool reverse, int64_t group_channels) {
  void* data = static_cast<char*>(tensor.mutable_data_ptr()) + first_step(tensor, reverse);
  const int64_t batch = tensor.stride(0), time = tensor.stride(1);
  const bool packs = packs_aligned(data, tensor, group_channels, {batch, time});
  return {data, batch, reverse ? -time : time, packs};
}

GroupedView grouped_view(const Tensor& tensor, bool reverse) {
  const bool grouped = tensor.dim() == 4;
  const void* data =
      static_cast<const char*>(tensor.const_data_ptr()) + first_step(tensor, reverse);
  const int64_t batch = tensor.stride(0), time = tensor.stride(1),
                group = grouped ? tensor.stride(2) : 0, state = tensor.stride(grouped ? 3 : 2),
                d_state = tensor.size(grouped ? 3 : 2);
  const bool packs = state == 1 && packs_aligned(data, tensor, d_state, {batch, time, group});
  return {data, batch, reverse ? -time : time, group, state, packs};
}

InputView step_view(const OptionalTensor& tensor) {
  if (!tensor) return {};
  return {tensor->const_data_ptr(), tensor->stride(0), 0, tensor->stride(1)};
}

GroupedView grouped_step_view(const Tensor& tensor) {
  const bool grouped = tensor.dim() == 3;
  return {tensor.const_data_ptr(), tensor.stride(0), 0, grouped ? tensor.stride(1) : 0,
          tensor.stride(grouped ? 2 : 1)};
}

}  // namespace mambablock
