// SPDX-License-Identifier: Apache-2.0
#include "common/host/cpu.h"

#include "mamba_step/backend.h"
#include "mamba_step/cpu/kernels.h"

namespace mambablock {
namespace {

// Rows of weights that a thread processes at least; whole vectors of channels.
constexpr int64_t kBlock = 16;

// Calls stage(begin, end) for the rows of a weight, distributed over threads.
template <class Stage>
void for_each_row(int64_t rows, Stage stage) {
  torch::stable::parallel_for(0, (rows + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    stage(begin * kBlock, end * kBlock < rows ? end * kBlock : rows);
  });
}

}  // namespace

void run_step(const Checks& checks, const MambaStepParams& p, const OptionalTensor& state_indices) {
  const std::vector<int64_t> used = state_rows(checks, state_indices, p.scan.rows);
  const int64_t* rows = used.data();
  const auto convolve = MAMBABLOCK_SELECT(mamba_step_convolve);
  const auto select = MAMBABLOCK_SELECT(mamba_step_select);
  const auto scan = MAMBABLOCK_SELECT(mamba_step_scan);
  const auto project = MAMBABLOCK_SELECT(mamba_step_project);
  for_each_row(p.conv.channels, [&](int64_t begin, int64_t end) { convolve(p, rows, begin, end); });
  for_each_row(p.x_proj.out_features, [&](int64_t begin, int64_t end) { select(p, begin, end); });
  if (p.norms) MAMBABLOCK_SELECT(mamba_step_normalize)(p, 0, p.x_proj.rows);
  for_each_row(p.scan.channels, [&](int64_t begin, int64_t end) { scan(p, rows, begin, end); });
  for_each_row(p.out_proj.out_features,
               [&](int64_t begin, int64_t end) { project(p, rows, begin, end); });
}

}  // namespace mambablock
