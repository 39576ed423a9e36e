// SPDX-License-Identifier: Apache-2.0
#include "common/host/cpu.h"

#include "selective_scan/backend.h"
#include "selective_scan/cpu/kernels.h"

namespace mambablock {
namespace {

class CpuPlan final : public SelectiveScanPlan {
 public:
  CpuPlan(const OpCall& call, const SelectiveScanInputs& in)
      : segments_(row_segments(call, in.length, kScanTimeTile)) {
    saved = scan_tiles(in);
    saved_type = call.checks.accumulator_type();
    group_partials = scan_blocks_in_group(in);
    channel_partials = in.batch;
  }

  void forward(const SelectiveScanForward& p) const override {
    run(MAMBABLOCK_SELECT(selective_scan_forward), p);
  }

  void backward(const SelectiveScanBackward& p) const override {
    run(MAMBABLOCK_SELECT(selective_scan_backward), p);
  }

 private:
  template <class Kernel, class Params>
  void run(Kernel kernel, const Params& p) const {
    torch::stable::parallel_for(0, scan_work_items(p), 1, [&](int64_t begin, int64_t end) {
      kernel(p, view_of(segments_), begin, end);
    });
  }

  std::vector<Segment> segments_;
};

}  // namespace

std::unique_ptr<SelectiveScanPlan> make_plan(const OpCall& call,
                                             const SelectiveScanInputs& inputs) {
  return std::make_unique<CpuPlan>(call, inputs);
}

}  // namespace mambablock
