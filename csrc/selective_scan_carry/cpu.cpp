// SPDX-License-Identifier: Apache-2.0
#include "common/host/cpu.h"

#include "selective_scan_carry/backend.h"
#include "selective_scan_carry/cpu/kernels.h"

namespace mambablock {
namespace {

template <class Kernel>
void run(Kernel kernel, const OpCall& call, const SelectiveScanCarry& p) {
  const std::vector<Segment> segments = row_segments(call, p.length, kScanTimeTile);
  torch::stable::parallel_for(0, scan_work_items(p), 1, [&](int64_t begin, int64_t end) {
    kernel(p, view_of(segments), begin, end);
  });
}

}  // namespace

void carry_forward(const OpCall& call, const SelectiveScanCarry& p) {
  run(MAMBABLOCK_SELECT(selective_scan_carry), call, p);
}

void carry_backward(const OpCall& call, const SelectiveScanCarry& p) {
  run(MAMBABLOCK_SELECT(selective_scan_carry_backward), call, p);
}

}  // namespace mambablock
