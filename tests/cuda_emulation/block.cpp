// SPDX-License-Identifier: Apache-2.0
//
// Runs the threads of a block as fibers, in an order drawn from a seed.
#include "emulation/block.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "races.h"

namespace mambablock_emulation {
namespace {

enum class State { ready, at_barrier, at_warp_op, exited };

struct Thread {
  Fiber fiber;
  uint3 index;
  State state;
  // Where it waits, and with what.
  const char* what;
  Place place;
  WarpOp op;
  unsigned mask;
  uint64_t bits;
  int operand, width;
};

constexpr const char* kWarpOpNames[] = {"__syncwarp",     "__shfl_sync",      "__shfl_xor_sync",
                                        "__shfl_up_sync", "__shfl_down_sync", "__ballot_sync"};

// The device: one launch at a time.
struct Device {
  std::mutex mutex;
  std::vector<std::unique_ptr<Thread>> threads;
  unsigned thread_count;
  std::vector<Thread*> ready;
  Thread* current;
  unsigned waiting, exited;
  std::exception_ptr error;
  std::unique_ptr<char[]> shared;
  RaceDetector races;
  void (*body)(void*);
  void* context;
} device;

std::string text(const Place& place) {
  std::ostringstream text;
  text << place.file_name() << ":" << place.line() << ":" << place.column() << ", in "
       << place.function_name();
  return text.str();
}

[[noreturn]] void fail(const std::string& problem, const Place& place) {
  std::ostringstream message;
  message << "CUDA emulation: block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z
          << "), thread (" << threadIdx.x << ", " << threadIdx.y << ", " << threadIdx.z
          << "): " << problem << " at " << text(place);
  throw std::runtime_error(message.str());
}

bool same_place(const Thread& a, const Thread& b) {
  return a.place.line() == b.place.line() && a.place.column() == b.place.column() &&
         strcmp(a.place.file_name(), b.place.file_name()) == 0 &&
         strcmp(a.place.function_name(), b.place.function_name()) == 0;
}

bool same_wait(const Thread& a, const Thread& b) {
  if (a.state != b.state) return false;
  if (a.state == State::exited) return true;
  return same_place(a, b) && (a.state == State::at_barrier || (a.op == b.op && a.mask == b.mask));
}

// No thread can go on: says how many wait where.
[[noreturn]] void fail_divergent() {
  std::ostringstream message;
  message << "CUDA emulation: block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z
          << "): its threads wait for each other:";
  std::vector<bool> told(device.thread_count);
  for (unsigned i = 0; i < device.thread_count; ++i) {
    if (told[i]) continue;
    const Thread& thread = *device.threads[i];
    unsigned count = 0;
    for (unsigned j = i; j < device.thread_count; ++j) {
      if (!same_wait(thread, *device.threads[j])) continue;
      told[j] = true;
      ++count;
    }
    message << "\n  " << count << " from thread " << i << " on ";
    if (thread.state == State::exited) {
      message << "have returned";
    } else {
      message << "at " << thread.what;
      if (thread.state == State::at_warp_op) {
        message << " with mask 0x" << std::hex << thread.mask << std::dec;
      }
      message << " at " << text(thread.place);
    }
  }
  throw std::runtime_error(message.str());
}

void make_ready(Thread& thread) {
  thread.state = State::ready;
  device.ready.push_back(&thread);
}

void run_thread() {
  Thread& thread = *device.current;
  thread.fiber.entered();
  try {
    device.body(device.context);
  } catch (...) {
    device.error = std::current_exception();
  }
  thread.state = State::exited;
  ++device.exited;
  thread.fiber.exit();
}

// Of the first lane's shuffle, where lane `lane` reads.
int source_lane(const Thread& thread, int lane) {
  const int segment = lane & ~(thread.width - 1), last = segment + thread.width - 1;
  switch (thread.op) {
    case WarpOp::shuffle:
      return segment + (thread.operand & (thread.width - 1));
    case WarpOp::shuffle_xor:
      // Reads of an earlier segment are allowed, and of a later one give the own value.
      return (lane ^ thread.operand) > last ? lane : lane ^ thread.operand;
    case WarpOp::shuffle_up:
      return lane - thread.operand < segment ? lane : lane - thread.operand;
    case WarpOp::shuffle_down:
      return lane + thread.operand > last ? lane : lane + thread.operand;
    default:
      return lane;
  }
}

// All lanes of the mask are at the same operation: gives each its result and makes it ready.
void finish_warp_op(std::unique_ptr<Thread>* warp, unsigned mask) {
  uint64_t results[32] = {};
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1 && warp[lane]->bits != 0) ballot |= 1u << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Thread& thread = *warp[lane];
    const int source = source_lane(thread, lane);
    if (source < 0 || source > 31 || !(mask >> source & 1)) {
      fail("lane " + std::to_string(lane) + " reads lane " + std::to_string(source) +
               ", which is not in the mask, in " + thread.what,
           thread.place);
    }
    results[lane] = thread.op == WarpOp::ballot ? ballot : warp[source]->bits;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    warp[lane]->bits = results[lane];
    make_ready(*warp[lane]);
  }
}

void run_block(uint3 index, size_t shared_bytes, std::mt19937& random) {
  blockIdx = index;
  memset(device.shared.get(), 0xff, shared_bytes);
  device.ready.clear();
  device.waiting = device.exited = 0;
  device.error = nullptr;
  device.races.start_block(device.thread_count);
  for (unsigned i = 0; i < device.thread_count; ++i) {
    Thread& thread = *device.threads[i];
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    thread.fiber.start(run_thread);
    make_ready(thread);
  }
  while (!device.ready.empty()) {
    std::swap(device.ready[random() % device.ready.size()], device.ready.back());
    device.current = device.ready.back();
    device.ready.pop_back();
    threadIdx = device.current->index;
    device.current->fiber.resume();
    device.current = nullptr;
    if (device.error) std::rethrow_exception(device.error);
  }
  if (device.exited < device.thread_count) fail_divergent();
}

unsigned seed() {
  const char* value = getenv("MAMBABLOCK_EMULATION_SEED");
  return value == nullptr ? 0 : unsigned(strtoul(value, nullptr, 10));
}

}  // namespace

void* shared_memory() { return device.shared.get(); }

void sync_block(const char* what, const Place& place) {
  Thread& self = *device.current;
  self.state = State::at_barrier;
  self.what = what;
  self.place = place;
  if (++device.waiting == device.thread_count) {
    for (unsigned i = 0; i < device.thread_count; ++i) {
      if (!same_place(*device.threads[i], self)) fail_divergent();
    }
    device.waiting = 0;
    device.races.block_synced();
    for (unsigned i = 0; i < device.thread_count; ++i) make_ready(*device.threads[i]);
  }
  self.fiber.yield();
}

uint64_t sync_warp(WarpOp op, unsigned mask, uint64_t bits, int operand, int width,
                   const Place& place) {
  Thread& self = *device.current;
  const unsigned rank = thread_rank(), first = rank & ~31u;
  self.what = kWarpOpNames[int(op)];
  const auto check = [&](bool right, const char* problem) {
    if (!right) fail(std::string(self.what) + " " + problem, place);
  };
  check(mask >> (rank & 31) & 1, "with a mask that lacks the calling lane");
  check(width > 0 && width <= 32 && (width & (width - 1)) == 0, "with a width not a power of two");
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    check(first + lane < device.thread_count, "with a mask of lanes that the block does not have");
    check(device.threads[first + lane]->state != State::exited,
          "with a mask of lanes that have returned");
  }
  self.state = State::at_warp_op;
  self.place = place;
  self.op = op;
  self.mask = mask;
  self.bits = bits;
  self.operand = operand;
  self.width = width;
  bool all = true;
  for (unsigned lane = 0; lane < 32; ++lane) {
    all = all && (!(mask >> lane & 1) || same_wait(*device.threads[first + lane], self));
  }
  if (all) {
    // Shuffles and votes order no accesses to memory.
    if (op == WarpOp::sync) device.races.warp_synced(first, mask);
    finish_warp_op(&device.threads[first], mask);
  }
  self.fiber.yield();
  return self.bits;
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context) {
  const std::lock_guard lock(device.mutex);
  gridDim = grid;
  blockDim = block;
  device.thread_count = block_size();
  while (device.threads.size() < device.thread_count) {
    device.threads.push_back(std::make_unique<Thread>());
  }
  device.shared = std::make_unique_for_overwrite<char[]>(shared_bytes);
  device.races.start_launch(device.shared.get(), shared_bytes);
  device.body = body;
  device.context = context;
  std::mt19937 random(seed());
  std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), uint64_t(0));
  std::shuffle(order.begin(), order.end(), random);
  for (const uint64_t i : order) {
    run_block({unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)},
              shared_bytes, random);
  }
}

}  // namespace mambablock_emulation

// What the thread sanitizer's instrumentation calls. The thread that is wrong ends here, since code
// compiled so expects no exception from these.
namespace {

using namespace mambablock_emulation;

void check_access(const void* address, size_t bytes, bool is_write, const void* caller) {
  Thread* const self = device.current;
  if (self == nullptr || self->fiber.owns(address)) return;
  const std::string problem = device.races.access(address, bytes, is_write, thread_rank());
  if (problem.empty()) return;
  std::ostringstream message;
  Dl_info library{};
  dladdr(caller, &library);
  message << "CUDA emulation: block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z
          << "), thread (" << threadIdx.x << ", " << threadIdx.y << ", " << threadIdx.z
          << "): a race: it " << problem << ", at " << library.dli_fname << "+0x" << std::hex
          << static_cast<const char*>(caller) - static_cast<const char*>(library.dli_fbase);
  device.error = std::make_exception_ptr(std::runtime_error(message.str()));
  self->fiber.exit();
}

}  // namespace

#define MAMBABLOCK_EMULATION_ACCESS(name, bytes, is_write)               \
  extern "C" void __tsan_##name(void* address) {                         \
    check_access(address, bytes, is_write, __builtin_return_address(0)); \
  }
#define MAMBABLOCK_EMULATION_ACCESSES(bytes)                       \
  MAMBABLOCK_EMULATION_ACCESS(read##bytes, bytes, false)           \
  MAMBABLOCK_EMULATION_ACCESS(write##bytes, bytes, true)           \
  MAMBABLOCK_EMULATION_ACCESS(unaligned_read##bytes, bytes, false) \
  MAMBABLOCK_EMULATION_ACCESS(unaligned_write##bytes, bytes, true)
MAMBABLOCK_EMULATION_ACCESSES(1)
MAMBABLOCK_EMULATION_ACCESSES(2)
MAMBABLOCK_EMULATION_ACCESSES(4)
MAMBABLOCK_EMULATION_ACCESSES(8)
MAMBABLOCK_EMULATION_ACCESSES(16)
MAMBABLOCK_EMULATION_ACCESS(vptr_read, sizeof(void*), false)

extern "C" {
void __tsan_read_range(void* address, size_t bytes) {
  check_access(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  check_access(address, bytes, true, __builtin_return_address(0));
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
