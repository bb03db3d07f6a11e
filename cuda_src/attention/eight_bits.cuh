// Numbers of 8 bits: to nearest even, those past the largest to that one.
#pragma once

#include <primitives/numeric.cuh>

__device__ __forceinline__ unsigned char to_int8(float x) {
  return isnan(x) ? 0 : static_cast<unsigned char>(static_cast<int>(rintf(fminf(fmaxf(x, -128.0f), 127.0f))));
}
__device__ __forceinline__ unsigned char to_e4m3(float x) {
  const int bits = __float_as_int(x), size = min(bits & 0x7fffffff, __float_as_int(448.0f));
  if (isnan(x)) return 0x7f;
  const int subnormal = static_cast<int>(rintf(__int_as_float(size) * 512));  // below 2^-6
  const int normal = (size + 0x7ffff + (size >> 20 & 1) >> 20) - (127 - 7 << 3);
  return static_cast<unsigned char>((size < __float_as_int(0x1p-6f) ? subnormal : normal) | bits >> 24 & 0x80);
}

// A float that lies between the same numbers of fewer bits: what is cut off leaves the last bit set.
__device__ __forceinline__ float to_odd(float x) { return x; }
__device__ __forceinline__ float to_odd(double x) {
  const float nearest = static_cast<float>(x);
  const int bits = __float_as_int(nearest);
  if (nearest == x) return nearest;
  return __int_as_float((fabs(static_cast<double>(nearest)) > fabs(x) ? bits - 1 : bits) | 1);
}
