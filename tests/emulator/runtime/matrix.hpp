// What a lane brings to an mma.
#pragma once

#include "state.hpp"

namespace emu {

struct MmaOperands {
  void* d;
  uint32_t a[4], b[2];  // of float64 the first two words of `a`, and `b`, are one element
};

inline const MmaOperands& mma_operands(const Thread& thread) {
  return *reinterpret_cast<const MmaOperands*>(thread.value);
}

}  // namespace emu
