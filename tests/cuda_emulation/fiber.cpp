// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

#include <stdint.h>
#include <sys/mman.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace mambablock_emulation {
namespace {

constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4 << 10;

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
  stack_ = static_cast<char*>(memory) + kGuardBytes;
}

Fiber::~Fiber() { munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes); }

bool Fiber::owns(const void* address) const {
  return size_t(static_cast<const char*>(address) - stack_) < kStackBytes;
}

#if defined(__x86_64__)

// glibc's swapcontext makes a system call, which costs forty times this: saves what a call must
// keep and the stack pointer, and goes on where another call of it saved them.
extern "C" void mambablock_emulation_switch(void** save, void* stack_pointer);
asm(R"(
.text
.hidden mambablock_emulation_switch
.globl mambablock_emulation_switch
.type mambablock_emulation_switch, @function
mambablock_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mambablock_emulation_switch, . - mambablock_emulation_switch
)");

#endif

void Fiber::start(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
  fake_stack_ = nullptr;
#if defined(__x86_64__)
  // Six registers, the address that the switch returns to, and entry()'s own, never used.
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 8;
  for (int i = 0; i < 8; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(entry);
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::resume() {
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack_, kStackBytes);
#endif
#if defined(__x86_64__)
  mambablock_emulation_switch(&host_stack_pointer_, stack_pointer_);
#else
  swapcontext(&host_context_, &context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Fiber::entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, &host_stack_, &host_stack_bytes_);
#endif
}

void Fiber::leave([[maybe_unused]] void** fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, host_stack_, host_stack_bytes_);
#endif
#if defined(__x86_64__)
  mambablock_emulation_switch(&stack_pointer_, host_stack_pointer_);
#else
  swapcontext(&context_, &host_context_);
#endif
}

void Fiber::yield() {
  leave(&fake_stack_);
  entered();
}

void Fiber::exit() { leave(nullptr); }

}  // namespace mambablock_emulation
