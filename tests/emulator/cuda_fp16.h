// Stands in for CUDA's header of the same name: the type and its conversions, nothing else.
#pragma once

#include <fp16_common.hpp>

struct __half {
  unsigned short bits;
};

inline float __half2float(__half x) {
  const unsigned int sign = static_cast<unsigned int>(x.bits & 0x8000) << 16;
  unsigned int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return ::emu::bits_float(mantissa ? 0x7fffffff : sign | 0x7f800000);
  if (exponent == 0) {
    if (mantissa == 0) return ::emu::bits_float(sign);
    const int shift = __builtin_clz(mantissa) - 21;  // brings the leading one to bit 10
    mantissa = mantissa << shift & 1023;
    exponent = static_cast<unsigned int>(1 - shift);
  }
  return ::emu::bits_float(sign | ((exponent + 112) << 23) | mantissa << 13);
}

inline __half __float2half_rn(float x) {
  return {::emu::round_to_16<unsigned int, 23, 127, 10, 15>(::emu::float_bits(x), 0x7fff)};
}

inline __half __double2half(double x) {
  return {::emu::round_to_16<unsigned long long, 52, 1023, 10, 15>(::emu::double_bits(x), 0x7fff)};
}
