// SPDX-License-Identifier: Apache-2.0
//
// What a device thread knows of its block, and the points where it waits for others of it.
// A broken rule of these is a std::runtime_error out of the launch.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <source_location>

#include "vector_types.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace mambablock_emulation {

using Place = std::source_location;

// The launch's dynamic shared memory: exactly as long as asked for, 0xff bytes before each block.
void* shared_memory();

inline unsigned block_size() { return blockDim.x * blockDim.y * blockDim.z; }
inline unsigned thread_rank() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

enum class WarpOp { sync, shuffle, shuffle_xor, shuffle_up, shuffle_down, ballot };

void sync_block(const char* what, const Place& place);

// `bits` is the caller's contribution, `operand` and `width` a shuffle's last two arguments.
uint64_t sync_warp(WarpOp op, unsigned mask, uint64_t bits, int operand, int width,
                   const Place& place);

// Runs body(context) as every thread of every block of the grid.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context);

}  // namespace mambablock_emulation
