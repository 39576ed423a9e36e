// SPDX-License-Identifier: Apache-2.0
#include "selective_scan/cuda/kernels.h"

#include <torch/csrc/stable/library.h>

#include "common/host/cuda.h"
#include "selective_scan/backend.h"

namespace mambablock {
namespace {

// Blocks that keep every multiprocessor busy: two, each with two warps of its four schedulers.
constexpr int64_t kBlocksPerMultiprocessor = 2;
// A chunk's second pass must be worth its first: it has at least this many tiles.
constexpr int64_t kLeastTilesPerChunk = 4;

// Cuts time into chunks where the rows of the batch and the channels alone leave more than half of
// the device idle: a chunk's exps are computed twice.
int64_t time_chunks(int64_t row_blocks, int64_t tiles, int64_t multiprocessors) {
  const int64_t wanted = kBlocksPerMultiprocessor * multiprocessors;
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

void allocate_carries(SelectiveScanCall& call) {
  SelectiveScanParams& p = call.params;
  if (p.chunks == 1 && p.d_state <= cuda_states_held(p.dtype)) return;
  call.kept.push_back(call.new_accumulators({p.batch, p.chunks, p.channels, p.d_state}));
  p.carry = call.kept.back()->mutable_data_ptr();
  call.kept.push_back(call.new_accumulators({p.batch, p.chunks, p.channels}));
  p.carry_dt = call.kept.back()->mutable_data_ptr();
}

// A pack of channels lies in one group.
void keep_packs_in_groups(SelectiveScanParams& p) {
  if (p.group_channels % kPack == 0) return;
  for (Strided3* input : {&p.u, &p.delta, &p.z, &p.dy}) {
    if (input->packs == Packs::kChannels) input->packs = Packs::kNone;
  }
  for (Strided3Out* output : {&p.y, &p.du, &p.ddelta, &p.dz}) output->packs = false;
}

// For tests and the curious: how many chunks of time a call of these sizes is worked on in.
int64_t selective_scan_chunks(Tensor u, int64_t groups) {
  if (groups < 1 || u.size(2) % groups != 0) {
    fail("selective_scan_chunks", "groups", "a divisor of d_inner=" + std::to_string(u.size(2)),
         groups);
  }
  const CudaContext context(u);
  SelectiveScanParams p{};
  p.group_channels = u.size(2) / groups;
  const int64_t blocks = u.size(0) * groups * cuda_blocks_in_group(p, kCudaForwardChannels);
  return time_chunks(blocks, (u.size(1) + kCudaTile - 1) / kCudaTile, context.multiprocessors());
}

}  // namespace

void prepare(SelectiveScanCall& call) {
  const CudaContext context(call.checks.input());
  SelectiveScanParams& p = call.params;
  p.boundaries = device_boundaries(context, call, p.length);
  p.reverse = call.reverse;
  p.tiles = (p.length + kCudaTile - 1) / kCudaTile;
  const int64_t blocks = p.batch * p.groups * cuda_blocks_in_group(p, kCudaForwardChannels);
  p.chunks = time_chunks(blocks, p.tiles, context.multiprocessors());
  p.chunk_tiles = (p.tiles + p.chunks - 1) / p.chunks;
  // Without empty chunks at the end.
  if (p.chunk_tiles > 0) p.chunks = (p.tiles + p.chunk_tiles - 1) / p.chunk_tiles;
  call.group_partials = cuda_blocks_in_group(p, backward_channels(context, p.dtype));
  call.channel_partials = p.batch * p.chunks;
}

void run_forward(SelectiveScanCall& call) {
  const CudaContext context(call.checks.input());
  const char* op = call.checks.op();
  allocate_carries(call);
  keep_packs_in_groups(call.params);
  if (call.params.chunks > 1) cuda_forward_carries(op, call.params, context.stream());
  cuda_forward(op, call.params, context.stream());
}

void run_backward(SelectiveScanCall& call) {
  const CudaContext context(call.checks.input());
  const char* op = call.checks.op();
  allocate_carries(call);
  keep_packs_in_groups(call.params);
  if (call.params.chunks > 1) cuda_backward_carries(op, call.params, context.stream());
  cuda_backward(op, call.params, backward_channels(context, call.params.dtype), context.stream());
}

STABLE_TORCH_LIBRARY_IMPL(mambablock, MAMBABLOCK_DISPATCH_KEY, library) {
  library.impl("selective_scan_chunks", TORCH_BOX(&selective_scan_chunks));
}

}  // namespace mambablock
