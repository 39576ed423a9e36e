// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

namespace mambablock {

// Writes (count + 1) boundaries, as Sequences wants them, from as many values of cu_seqlens,
// `stride` apart: the first becomes 0, the last length, and the others at least the one before and
// at most length, so that no value leads out of bounds. With `reverse`, those of the flipped row.
template <class Index>
void write_boundaries(const char* op, const Index* cu_seqlens, int64_t stride, int64_t count,
                      int64_t length, bool reverse, int64_t* boundaries, cudaStream_t stream);

}  // namespace mambablock
