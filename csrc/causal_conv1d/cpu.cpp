// SPDX-License-Identifier: Apache-2.0
#include "common/host/cpu.h"
#include "causal_conv1d/backend.h"

namespace mambablock {
namespace {

using Kernel = decltype(&baseline::causal_conv1d_forward);

void run(Kernel kernel, const CausalConv1dParams& p) {
  torch::stable::parallel_for(0, causal_conv1d_work_items(p), 1,
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

void prepare(CausalConv1dCall& call) {
  CausalConv1dParams& p = call.params;
  call.segments =
      row_segments(call.checks, call.cu_seqlens, p.batch, p.length, kConvTimeTile, call.reverse);
  p.segments = call.segments.data();
  p.segment_count = int64_t(call.segments.size());
  call.partials = p.batch * causal_conv1d_chunks(p);
}

void run_forward(const CausalConv1dCall& call) {
  run(MAMBABLOCK_SELECT(causal_conv1d_forward), call.params);
}

void run_backward(const CausalConv1dCall& call) {
  run(MAMBABLOCK_SELECT(causal_conv1d_backward), call.params);
}

}  // namespace mambablock
