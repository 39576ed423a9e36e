// SPDX-License-Identifier: Apache-2.0
//
// What the CUDA kernels share.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <stdexcept>
#include <string>

#include "common/convert.h"
#include "common/views.h"

namespace mambablock {

// Values that are loaded and stored at once, up to 16 bytes.
template <class T, int Count>
struct alignas(Count * sizeof(T) < 16 ? Count * sizeof(T) : 16) Pack {
  T values[Count];
};

// Accumulators that one instruction moves to or from shared memory.
template <class A>
inline constexpr int kQuad = 16 / sizeof(A);

// The block's dynamic shared memory.
__device__ inline unsigned char* shared_memory() {
#if defined(MAMBABLOCK_EMULATION)
  return static_cast<unsigned char*>(mambablock_emulation::shared_memory());
#else
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
#endif
}

// Consecutive Count values of a type at least as large, at a multiple of their size.
template <class A, int Count>
__device__ __forceinline__ void load_quads(const A* source, A (&values)[Count]) {
  static_assert(Count % kQuad<A> == 0);
#pragma unroll
  for (int i = 0; i < Count; i += kQuad<A>) {
    *reinterpret_cast<Pack<A, kQuad<A>>*>(&values[i]) =
        *reinterpret_cast<const Pack<A, kQuad<A>>*>(source + i);
  }
}

template <class A, int Count>
__device__ __forceinline__ void store_quads(const A (&values)[Count], A* target) {
  static_assert(Count % kQuad<A> == 0);
#pragma unroll
  for (int i = 0; i < Count; i += kQuad<A>) {
    Pack<A, kQuad<A>> quad;
#pragma unroll
    for (int j = 0; j < kQuad<A>; ++j) quad.values[j] = values[i + j];
    *reinterpret_cast<Pack<A, kQuad<A>>*>(target + i) = quad;
  }
}

// The same value, of which nothing is computed ahead. Compilers compute what passes of a loop have
// in common before it, also for branches that are rarely taken, and registers run out.
__device__ __forceinline__ int64_t used_here(int64_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(value));
#endif
  return value;
}

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// Calls function(Flag<flag>), so that what follows from the flag is decided once.
template <class F>
__device__ __forceinline__ void with_flag(bool flag, F function) {
  if (flag) {
    function(Flag<true>());
  } else {
    function(Flag<false>());
  }
}

// One of them.
template <class A>
__device__ __forceinline__ Pack<A, kQuad<A>> quad_at(const A* source) {
  return *reinterpret_cast<const Pack<A, kQuad<A>>*>(source);
}

inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA must run the kernel; got \"" +
                             cudaGetErrorString(error) + "\"");
  }
}

// Launches kernel(args...) on `blocks` blocks, if any.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads,
            size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string(op) + ": blocks must be at most 2147483647; got " +
                             std::to_string(blocks));
  }
  constexpr size_t without_asking = 48 * 1024;
  if (shared_bytes > without_asking) {
    check_cuda(
        op, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check_cuda(op, cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace mambablock
