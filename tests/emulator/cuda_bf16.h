// Stands in for CUDA's header of the same name: the type and its conversions, nothing else.
#pragma once

#include <fp16_common.hpp>

struct __nv_bfloat16 {
  unsigned short bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return ::emu::bits_float(static_cast<unsigned int>(x.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return {::emu::round_to_16<unsigned int, 23, 127, 7, 127>(::emu::float_bits(x), 0x7fff)};
}

inline __nv_bfloat16 __double2bfloat16(double x) {
  return {::emu::round_to_16<unsigned long long, 52, 1023, 7, 127>(::emu::double_bits(x), 0x7fff)};
}
