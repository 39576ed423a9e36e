// SPDX-License-Identifier: Apache-2.0
#include "common/host/cuda.h"

#include <algorithm>

#include "common/cuda/boundaries.h"
#include "common/cuda/sums.h"
#include "common/host/parameters.h"
#include "common/host/partial_sums.h"

namespace mambablock {

OptionalTensor device_boundaries(const OpCall& call, int64_t length) {
  if (!call.cu_seqlens) return std::nullopt;
  const CudaContext context(call.checks.input());
  const Tensor& cu_seqlens = *call.cu_seqlens;
  const Tensor boundaries =
      torch::stable::new_empty(cu_seqlens, {call.states + 1}, ScalarType::Long);
  const auto write = [&](const auto* values) {
    write_boundaries(call.checks.op(), values, cu_seqlens.stride(0), call.states, length,
                     call.reverse, static_cast<int64_t*>(boundaries.mutable_data_ptr()),
                     context.stream());
  };
  if (cu_seqlens.scalar_type() == ScalarType::Int) {
    write(static_cast<const int32_t*>(cu_seqlens.const_data_ptr()));
  } else {
    write(static_cast<const int64_t*>(cu_seqlens.const_data_ptr()));
  }
  return boundaries;
}

KernelParameter kernel_parameter(const Checks& checks, const OptionalTensor& parameter,
                                 bool is_log) {
  if (!parameter) return {};
  const ScalarType type = parameter->scalar_type();
  const OptionalTensor values = contiguous_as(parameter, type);
  return {values, {data_of(values), dtype_of(checks.op(), "parameter", type), is_log}};
}

std::vector<Tensor> sum_partials(const std::vector<PartialSums>& sums) {
  const char* const op = "sum_partials";
  const CudaContext context(sums.front().partials);
  std::vector<Tensor> totals;
  std::vector<RowSums> rows;
  for (const PartialSums& of : sums) {
    totals.push_back(torch::stable::new_empty(of.like, of.like.sizes()));
    rows.push_back({of.partials.const_data_ptr(), of.count, of.like.numel(),
                    totals.back().mutable_data_ptr(), dtype_of(op, "like", of.like.scalar_type()),
                    of.factor});
  }
  const DType dtype = dtype_of(op, "partials", sums.front().partials.scalar_type());
  for (size_t i = 0; i < rows.size(); i += kMostRowSums) {
    sum_rows(op, dtype, &rows[i], int(std::min<size_t>(rows.size() - i, kMostRowSums)),
             context.stream());
  }
  return totals;
}

}  // namespace mambablock
