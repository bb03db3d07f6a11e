// What a lane brings to an mma, and the arithmetic of tensor cores, which add
// to float32 with truncation: the products of one instruction, which are exact,
// and the accumulator are added in float64 here, and the sum loses what float32
// has no bits for.
#pragma once

#include <cmath>

#include "state.hpp"

namespace emu {

struct MmaOperands {
  void* d;
  uint32_t a[4],
      b[2];  // of float64 the first two words of `a`, and `b`, are one element
};

inline const MmaOperands& mma_operands(const Thread& thread) {
  return *reinterpret_cast<const MmaOperands*>(thread.value);
}

using Pair = double __attribute__((vector_size(16)));
using Floats = float __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(16)));

inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Towards zero; an overflow is infinite.
inline float truncate(double x) {
  constexpr uint64_t kSmallest = uint64_t(1023 - 126) << 52, kInfinity = uint64_t(2047) << 52;
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint64_t magnitude = bits << 1 >> 1;
  if (magnitude == 0) return static_cast<float>(x);
  if (magnitude > kInfinity) return as_float(0x7fffffff);
  if (magnitude < kSmallest) return static_cast<float>(std::trunc(x * 0x1p149) * 0x1p-149);
  bits &= ~((uint64_t(1) << 29) - 1);
  memcpy(&x, &bits, sizeof x);
  return static_cast<float>(x);
}

// 16-bit elements as float32, exact. They come in the upper halves of four
// words, whose lower halves are zero.
template <bool kHalf>
inline Floats expand(Words upper) {
  if (!kHalf) return reinterpret_cast<Floats>(upper);
  const Words magnitude = (upper & 0x7fffffff) >> 3, sign = upper & 0x80000000;
  const Floats finite = reinterpret_cast<Floats>(magnitude) * 0x1p112f;
  const Words special = reinterpret_cast<Words>(magnitude >= 0x0f800000) & 0x7f800000;
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(finite) | sign | special);
}

}  // namespace emu
