// SPDX-License-Identifier: Apache-2.0
#include "common/host/cuda.h"

#include "selective_scan_carry/backend.h"
#include "selective_scan_carry/cuda/kernels.h"

namespace mambablock {
namespace {

// Blocks of threads that keep a large device busy.
constexpr int64_t kWantedBlocks = 528;
constexpr int64_t kLeastSteps = 64;  // of a chunk

void run(const OpCall& call, const SelectiveScanCarry& p, bool backward) {
  const OptionalTensor boundaries = device_boundaries(call, p.length);
  const CudaContext context(call.checks.input());
  const int64_t blocks = cuda_carry_blocks(p);
  int64_t chunks = blocks == 0 ? 1 : (kWantedBlocks + blocks - 1) / blocks;
  const int64_t most = (p.length + kLeastSteps - 1) / kLeastSteps;
  if (chunks > most) chunks = most > 0 ? most : 1;
  CarryCudaPlan plan{.boundaries = static_cast<const int64_t*>(data_of(boundaries)),
                     .reverse = call.reverse,
                     .backward = backward,
                     .chunks = chunks,
                     .chunk_steps = (p.length + chunks - 1) / chunks,
                     .state = nullptr,
                     .dt_sum = nullptr};
  const Tensor state = call.new_accumulators({p.batch, chunks, p.channels, p.d_state}),
               dt_sum = call.new_accumulators({p.batch, chunks, p.channels});
  plan.state = state.mutable_data_ptr();
  plan.dt_sum = dt_sum.mutable_data_ptr();
  cuda_carry(call.checks.op(), p, plan, context.stream());
}

}  // namespace

void carry_forward(const OpCall& call, const SelectiveScanCarry& p) { run(call, p, false); }

void carry_backward(const OpCall& call, const SelectiveScanCarry& p) { run(call, p, true); }

}  // namespace mambablock
