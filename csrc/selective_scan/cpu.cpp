// SPDX-License-Identifier: Apache-2.0
#include "common/host/cpu.h"
#include "selective_scan/backend.h"

namespace mambablock {
namespace {

using Kernel = decltype(&baseline::selective_scan_forward);

void run(Kernel kernel, const SelectiveScanParams& p) {
  torch::stable::parallel_for(0, selective_scan_work_items(p), 1,
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

void prepare(SelectiveScanCall& call) {
  SelectiveScanParams& p = call.params;
  call.segments =
      row_segments(call.checks, call.cu_seqlens, p.batch, p.length, kScanTimeTile, call.reverse);
  p.segments = call.segments.data();
  p.segment_count = int64_t(call.segments.size());
  p.tiles = scan_time_tiles(p.length);
  call.group_partials = selective_scan_blocks_in_group(p);
  call.channel_partials = p.batch;
}

void run_forward(SelectiveScanCall& call) {
  run(MAMBABLOCK_SELECT(selective_scan_forward), call.params);
}

void run_backward(SelectiveScanCall& call) {
  run(MAMBABLOCK_SELECT(selective_scan_backward), call.params);
}

}  // namespace mambablock
