// SPDX-License-Identifier: Apache-2.0
#include "common/host/cpu.h"

#include "causal_conv1d/backend.h"
#include "causal_conv1d/cpu/kernels.h"

namespace mambablock {
namespace {

class CpuPlan final : public CausalConv1dPlan {
 public:
  CpuPlan(const OpCall& call, const CausalConv1dInputs& in)
      : segments_(row_segments(call, in.length, kConvTimeTile)) {
    partials = in.batch * conv_chunks(view_of(segments_));
  }

  void forward(const CausalConv1dForward& p) const override {
    run(MAMBABLOCK_SELECT(causal_conv1d_forward), p);
  }

  void backward(const CausalConv1dBackward& p) const override {
    run(MAMBABLOCK_SELECT(causal_conv1d_backward), p);
  }

 private:
  template <class Kernel, class Params>
  void run(Kernel kernel, const Params& p) const {
    const RowSegments segments = view_of(segments_);
    torch::stable::parallel_for(
        0, conv_work_items(p, segments), 1,
        [&](int64_t begin, int64_t end) { kernel(p, segments, begin, end); });
  }

  std::vector<Segment> segments_;
};

}  // namespace

std::unique_ptr<CausalConv1dPlan> make_plan(const OpCall& call, const CausalConv1dInputs& inputs) {
  return std::make_unique<CpuPlan>(call, inputs);
}

}  // namespace mambablock
