// Numbers of tensor cores. They add to float32 with truncation: the products of one instruction, which are exact, and
// the accumulator are added in float64 here, and the sum loses what float32 has no bits for.
#pragma once

#include <cmath>

#include "execution/state.hpp"

namespace soft {

inline float as_float(u32 bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

using Quad = double __attribute__((vector_size(32)));
using Words = u32 __attribute__((vector_size(16)));
using Floats = float __attribute__((vector_size(16)));

// 16-bit elements as float32, exact. They come in the upper halves of four words, whose lower halves are zero.
template <bool kBfloat>
inline Floats expand(Words upper) {
  if (kBfloat) return reinterpret_cast<Floats>(upper);
  const Words magnitude = (upper & 0x7fffffff) >> 3, sign = upper & 0x80000000;
  const Floats finite = reinterpret_cast<Floats>(magnitude) * 0x1p112f;
  const Words special = reinterpret_cast<Words>(magnitude >= 0x0f800000) & 0x7f800000;
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(finite) | sign | special);
}

// Towards zero; an overflow is infinite; any NaN is 0x7fffffff.
inline float truncate(double x) {
  constexpr u64 kSmallest = u64(1023 - 126) << 52, kInfinity = u64(2047) << 52;
  u64 bits;
  memcpy(&bits, &x, sizeof bits);
  const u64 magnitude = bits << 1 >> 1;
  if (magnitude == 0) return static_cast<float>(x);
  if (magnitude > kInfinity) return as_float(0x7fffffff);
  if (magnitude < kSmallest) return static_cast<float>(std::trunc(x * 0x1p149) * 0x1p-149);
  bits &= ~((u64(1) << 29) - 1);
  memcpy(&x, &bits, sizeof x);
  return static_cast<float>(x);
}

}  // namespace soft
