// SPDX-License-Identifier: Apache-2.0
#include "common/host/cpu.h"

#include <algorithm>
#include <numeric>

#include "common/host/parameters.h"
#include "common/host/partial_sums.h"

namespace mambablock {
namespace {

// The values of an int32 or int64 vector.
std::vector<int64_t> index_values(const Tensor& tensor) {
  std::vector<int64_t> values(tensor.numel());
  const int64_t stride = tensor.stride(0);
  const void* data = tensor.const_data_ptr();
  for (int64_t i = 0; i < int64_t(values.size()); ++i) {
    values[i] = tensor.scalar_type() == ScalarType::Int
                    ? static_cast<const int32_t*>(data)[i * stride]
                    : static_cast<const int64_t*>(data)[i * stride];
  }
  return values;
}

}  // namespace

std::vector<int64_t> state_rows(const Checks& checks, const OptionalTensor& state_indices,
                                int64_t rows) {
  const char *op = checks.op(), *name = "state_indices";
  if (!state_indices) {
    std::vector<int64_t> identity(checks.batch().value);
    std::iota(identity.begin(), identity.end(), 0);
    return identity;
  }
  std::vector<int64_t> values = index_values(*state_indices), sorted;
  for (const int64_t value : values) {
    if (value >= rows) fail(op, name, "below the state's " + std::to_string(rows) + " rows", value);
    if (value >= 0) sorted.push_back(value);
  }
  std::sort(sorted.begin(), sorted.end());
  const auto twin = std::adjacent_find(sorted.begin(), sorted.end());
  if (twin != sorted.end()) fail(op, name, "distinct", std::to_string(*twin) + " twice");
  return values;
}

std::vector<Segment> row_segments(const OpCall& call, int64_t length, int64_t tile) {
  if (!call.cu_seqlens) return time_segments({0, length}, tile);
  std::vector<int64_t> values = index_values(*call.cu_seqlens);
  const auto require = [&](bool holds, size_t at) {
    if (!holds) {
      fail(call.checks.op(), "cu_seqlens", "rising from 0 to length=" + std::to_string(length),
           std::to_string(values[at]) + " at position " + std::to_string(at));
    }
  };
  require(values.front() == 0, 0);
  for (size_t i = 1; i < values.size(); ++i) require(values[i] >= values[i - 1], i);
  require(values.back() == length, values.size() - 1);
  if (!call.reverse) return time_segments(values, tile);
  std::vector<int64_t> flipped(values.rbegin(), values.rend());
  for (int64_t& value : flipped) value = length - value;
  std::vector<Segment> segments = time_segments(flipped, tile);
  for (Segment& segment : segments) segment.sequence = call.states - 1 - segment.sequence;
  return segments;
}

namespace {

Tensor call_aten(const char* name, const Tensor& tensor) {
  StableIValue stack[]{torch::stable::detail::from(tensor)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

KernelParameter kernel_parameter(const Checks& checks, const OptionalTensor& parameter,
                                 bool is_log) {
  OptionalTensor values = contiguous_as(parameter, checks.accumulator_type());
  if (values && is_log) values = call_aten("aten::neg", call_aten("aten::exp", *values));
  return {values, {data_of(values), checks.accumulator()}};
}

namespace {

// total *= factor, where that is not null.
template <class A>
void sum_rows(const A* partials, int64_t count, int64_t size, const A* factor, A* total) {
  torch::stable::parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) total[i] = 0;
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t i = begin; i < end; ++i) total[i] += partials[row * size + i];
    }
    if (factor == nullptr) return;
    for (int64_t i = begin; i < end; ++i) total[i] *= factor[i];
  });
}

}  // namespace

std::vector<Tensor> sum_partials(const std::vector<PartialSums>& sums) {
  std::vector<Tensor> totals;
  for (const PartialSums& of : sums) {
    const ScalarType type = of.partials.scalar_type();
    const Tensor total = torch::stable::new_empty(of.like, of.like.sizes(), type);
    const auto sum = [&](auto zero) {
      using A = decltype(zero);
      sum_rows(static_cast<const A*>(of.partials.const_data_ptr()), of.count, of.like.numel(),
               static_cast<const A*>(of.factor.data), static_cast<A*>(total.mutable_data_ptr()));
    };
    type == ScalarType::Double ? sum(double{}) : sum(float{});
    totals.push_back(*contiguous_as(total, of.like.scalar_type()));
  }
  return totals;
}

}  // namespace mambablock
