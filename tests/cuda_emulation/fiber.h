// SPDX-License-Identifier: Apache-2.0
//
// Fibers: functions with stacks of their own, among which one thread of the host switches by hand.
#pragma once

#include <stddef.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace mambablock_emulation {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;

  // Forgets what the fiber was at; the next resume begins entry(), which must end in exit().
  void start(void (*entry)());

  // Whether an address is on the fiber's stack.
  bool owns(const void* address) const;

  // From the host's stack: runs the fiber until it yields or exits.
  void resume();

  // From the fiber's own stack.
  void entered();
  void yield();
  void exit();

 private:
  void leave(void** fake_stack);

  char* stack_;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
  void* host_stack_pointer_ = nullptr;
#else
  ucontext_t context_, host_context_;
#endif
  void* fake_stack_ = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_stack_bytes_ = 0;
};

}  // namespace mambablock_emulation
