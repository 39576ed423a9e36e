// SPDX-License-Identifier: Apache-2.0
#include "common/host/cuda.h"

#include "selective_scan/backend.h"
#include "selective_scan/cuda/kernels.h"

namespace mambablock {
namespace {

// Blocks that keep every multiprocessor busy: two, each with two warps of its four schedulers.
constexpr int64_t kBlocksPerMultiprocessor = 2;
// A chunk's second pass must be worth its first: it has at least this many tiles.
constexpr int64_t kLeastTilesPerChunk = 4;

int64_t cuda_tiles(int64_t length) { return (length + kCudaTile - 1) / kCudaTile; }

// Divides time into chunks where the rows of the batch and the channels alone leave more than half
// of the device idle: a chunk's exps are computed twice.
int64_t time_chunks(const CudaContext& context, int64_t row_blocks, int64_t tiles) {
  const int64_t wanted = kBlocksPerMultiprocessor * context.multiprocessors();
  if (row_blocks == 0 || 2 * row_blocks > wanted) return 1;
  const int64_t chunks = (wanted + row_blocks - 1) / row_blocks;
  const int64_t most = (tiles + kLeastTilesPerChunk - 1) / kLeastTilesPerChunk;
  return chunks < most ? chunks : most > 0 ? most : 1;
}

// Wide blocks leave fewer partial sums, and need more memory.
int backward_channels(const CudaContext& context, DType dtype) {
  constexpr int wide = 64, narrow = 32;
  if (dtype == DType::float32 || dtype == DType::float64) return narrow;
  const auto needed = int64_t(cuda_backward_shared_memory(dtype, wide));
  return needed <= context.shared_memory_per_block() ? wide : narrow;
}

class CudaPlan final : public SelectiveScanPlan {
 public:
  CudaPlan(const OpCall& call, const SelectiveScanInputs& in)
      : call_(call), boundaries_(device_boundaries(call, in.length)) {
    const CudaContext context(call.checks.input());
    backward_channels_ = backward_channels(context, in.dtype);
    tiles = cuda_tiles(in.length);
    const int64_t row_blocks =
        in.batch * in.groups * cuda_blocks_in_group(in.group_channels, kCudaForwardChannels);
    chunks_ = time_chunks(context, row_blocks, tiles);
    chunk_tiles_ = (tiles + chunks_ - 1) / chunks_;
    // Without empty chunks at the end.
    if (chunk_tiles_ > 0) chunks_ = (tiles + chunk_tiles_ - 1) / chunk_tiles_;
    group_partials = cuda_blocks_in_group(in.group_channels, backward_channels_);
    channel_partials = in.batch * chunks_;
  }

  void forward(const SelectiveScanForward& p) const override {
    const CudaContext context(call_.checks.input());
    const Carries carries(*this, p);
    if (chunks_ > 1) cuda_forward_carries(call_.checks.op(), p, carries.plan, context.stream());
    cuda_forward(call_.checks.op(), p, carries.plan, context.stream());
  }

  void backward(const SelectiveScanBackward& p) const override {
    const CudaContext context(call_.checks.input());
    const Carries carries(*this, p);
    if (chunks_ > 1) cuda_backward_carries(call_.checks.op(), p, carries.plan, context.stream());
    cuda_backward(call_.checks.op(), p, carries.plan, backward_channels_, context.stream());
  }

 private:
  // The kernels' plan, with the memory of the carries, which only lives as long as they run.
  struct Carries {
    Carries(const CudaPlan& own, const SelectiveScanInputs& p)
        : plan{.boundaries = static_cast<const int64_t*>(data_of(own.boundaries_)),
               .reverse = own.call_.reverse,
               .tiles = own.tiles,
               .chunks = own.chunks_,
               .chunk_tiles = own.chunk_tiles_,
               .carry = nullptr,
               .carry_dt = nullptr} {
      if (plan.chunks == 1 && p.d_state <= cuda_states_held(p.dtype)) return;
      state = own.call_.new_accumulators({p.batch, plan.chunks, p.channels, p.d_state});
      dt = own.call_.new_accumulators({p.batch, plan.chunks, p.channels});
      plan.carry = state->mutable_data_ptr();
      plan.carry_dt = dt->mutable_data_ptr();
    }

    OptionalTensor state, dt;
    ScanCudaPlan plan;
  };

  const OpCall& call_;
  OptionalTensor boundaries_;
  int backward_channels_;
  int64_t chunks_, chunk_tiles_;
};

// For tests: into how many chunks of time a call of these sizes is divided.
int64_t selective_scan_chunks(Tensor u, int64_t groups) {
  if (groups < 1 || u.size(2) % groups != 0) {
    fail("selective_scan_chunks", "groups", "a divisor of d_inner=" + std::to_string(u.size(2)),
         groups);
  }
  const int64_t blocks =
      u.size(0) * groups * cuda_blocks_in_group(u.size(2) / groups, kCudaForwardChannels);
  return time_chunks(CudaContext(u), blocks, cuda_tiles(u.size(1)));
}

}  // namespace

std::unique_ptr<SelectiveScanPlan> make_plan(const OpCall& call,
                                             const SelectiveScanInputs& inputs) {
  return std::make_unique<CudaPlan>(call, inputs);
}

STABLE_TORCH_LIBRARY_IMPL(mambablock, MAMBABLOCK_DISPATCH_KEY, library) {
  library.impl("selective_scan_chunks", TORCH_BOX(&selective_scan_chunks));
}

}  // namespace mambablock
