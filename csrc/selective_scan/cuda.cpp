// SPDX-License-Identifier: Apache-2.0
#include "common/host/cuda.h"

#include "selective_scan/backend.h"
#include "selective_scan/cuda/kernels.h"

namespace mambablock {
namespace {

// Blocks that keep every multiprocessor busy: two, each with a warp of its four schedulers.
constexpr int64_t kBlocksPerMultiprocessor = 2;
// A chunk's second pass must be worth its first: it has at least this many tiles.
constexpr int64_t kLeastTilesPerChunk = 4;

int64_t tiles_of(int64_t length, int64_t tile) { return (length + tile - 1) / tile; }

// Divides time into chunks where the rows of the batch and the channels alone leave more than half
// of the device idle: a chunk's exps are computed twice. There are as many as the device has room
// for at once.
int64_t time_chunks(const CudaContext& context, int64_t row_blocks, int64_t tiles) {
  const int64_t wanted = kBlocksPerMultiprocessor * context.multiprocessors();
  if (row_blocks == 0 || 2 * row_blocks > wanted) return 1;
  const int64_t chunks = wanted / row_blocks;
  const int64_t most = (tiles + kLeastTilesPerChunk - 1) / kLeastTilesPerChunk;
  return chunks < most ? chunks : most > 0 ? most : 1;
}

class CudaPlan final : public SelectiveScanPlan {
 public:
  CudaPlan(const OpCall& call, const SelectiveScanInputs& in)
      : call_(call), boundaries_(device_boundaries(call, in.length)) {
    const CudaContext context(call.checks.input());
    const int64_t tiles = tiles_of(in.length, kCudaTile);
    const int64_t row_blocks =
        in.batch * in.groups * cuda_blocks_in_group(in.group_channels, kCudaForwardChannels);
    chunks_ = time_chunks(context, row_blocks, tiles);
    const int64_t chunk_tiles = tiles_of(tiles, chunks_);
    // Without empty chunks at the end.
    if (chunk_tiles > 0) chunks_ = tiles_of(tiles, chunk_tiles);
    chunk_steps_ = chunk_tiles * kCudaTile;
    saved = tiles_of(in.length, kCudaSavedSteps);
    saved_type =
        in.dtype == DType::bfloat16 ? ScalarType::BFloat16 : call.checks.accumulator_type();
    group_partials = cuda_blocks_in_group(in.group_channels, in.dtype == DType::float64
                                                                 ? kCudaBackwardChannels<double>
                                                                 : kCudaBackwardChannels<float>);
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
    cuda_backward(call_.checks.op(), p, carries.plan, context.stream());
  }

 private:
  // The kernels' plan, with the memory of the carries, which only lives as long as they run.
  struct Carries {
    Carries(const CudaPlan& own, const SelectiveScanInputs& p)
        : plan{.boundaries = static_cast<const int64_t*>(data_of(own.boundaries_)),
               .reverse = own.call_.reverse,
               .saved = own.saved,
               .chunks = own.chunks_,
               .chunk_steps = own.chunk_steps_,
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
  int64_t chunks_, chunk_steps_;
};

// For tests: into how many chunks of time a call of these sizes is divided.
int64_t selective_scan_chunks(Tensor u, int64_t groups) {
  if (groups < 1 || u.size(2) % groups != 0) {
    fail("selective_scan_chunks", "groups", "a divisor of d_inner=" + std::to_string(u.size(2)),
         groups);
  }
  const int64_t blocks =
      u.size(0) * groups * cuda_blocks_in_group(u.size(2) / groups, kCudaForwardChannels);
  return time_chunks(CudaContext(u), blocks, tiles_of(u.size(1), kCudaTile));
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
