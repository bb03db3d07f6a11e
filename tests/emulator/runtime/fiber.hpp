// A context switch of a dozen instructions, and the stacks it switches between. No ucontext: musl has none.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

extern "C" void emu_switch(void** save_stack_pointer, void* load_stack_pointer);

namespace emu {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGuardBytes = 4096;

// Stacks of equal size, kept from launch to launch, each with an inaccessible page below it.
class StackPool {
 public:
  // Highest usable address of stack `index`, less a stagger that keeps the stacks' hot ends in different cache sets.
  char* top(size_t index) {
    while (index >= count_) grow();
    return slabs_[index / kSlab] + (index % kSlab + 1) * kStackBytes - (index % 61) * 128;
  }

  bool in_guard_page(const void* address) const {
    const auto* byte = static_cast<const char*>(address);
    for (size_t slab = 0; slab < count_ / kSlab; ++slab) {
      if (byte >= slabs_[slab] && byte < slabs_[slab] + kSlab * kStackBytes) {
        return static_cast<size_t>(byte - slabs_[slab]) % kStackBytes < kGuardBytes;
      }
    }
    return false;
  }

 private:
  static constexpr size_t kSlab = 256, kMaxSlabs = 128;

  void grow() {
    void* memory = mmap(nullptr, kSlab * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || count_ / kSlab == kMaxSlabs) __builtin_trap();
    char* slab = slabs_[count_ / kSlab] = static_cast<char*>(memory);
    for (size_t i = 0; i < kSlab; ++i) mprotect(slab + i * kStackBytes, kGuardBytes, PROT_NONE);
    count_ += kSlab;
  }

  char* slabs_[kMaxSlabs];
  size_t count_ = 0;
};

// Prepares a stack so that the first switch to the returned pointer calls entry(), which must never return.
inline void* prepare_stack(char* top, void (*entry)()) {
  auto* frame = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
#if defined(__x86_64__)
  frame -= 8;  // rbx rbp r12 r13 r14 r15, the return address, and a zero in place of entry's own
  for (int i = 0; i < 6; ++i) frame[i] = 0;
  frame[6] = reinterpret_cast<uintptr_t>(entry);
  frame[7] = 0;
#elif defined(__aarch64__)
  frame -= 20;  // x19 ... x30, d8 ... d15
  for (int i = 0; i < 20; ++i) frame[i] = 0;
  frame[11] = reinterpret_cast<uintptr_t>(entry);
#else
#error "the emulator's context switch is written for x86-64 and aarch64"
#endif
  return frame;
}

inline uint64_t float_mode() {
#if defined(__x86_64__)
  return __builtin_ia32_stmxcsr();
#else
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
#endif
}

inline void restore_float_mode(uint64_t old) {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(static_cast<unsigned int>(old));
#else
  asm volatile("msr fpcr, %0" ::"r"(old));
#endif
}

#if defined(__x86_64__)
constexpr uint64_t kFlushBits = 0x8040;  // operands and results
#else
constexpr uint64_t kFlushBits = uint64_t(1) << 24;
#endif

// Computes with subnormals, whatever mode the caller is in; returns what to restore.
inline uint64_t keep_subnormals() {
  const uint64_t old = float_mode();
  restore_float_mode(old & ~kFlushBits);
  return old;
}

}  // namespace emu
