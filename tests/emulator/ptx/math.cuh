// Twin of cuda_src/ptx/math.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace emu {

template <class T>
struct CvtTo;
template <>
struct CvtTo<__half> {
  static unsigned int bits(float x) { return __float2half_rn(x).bits; }
};
template <>
struct CvtTo<__nv_bfloat16> {
  static unsigned int bits(float x) { return __float2bfloat16_rn(x).bits; }
};

// What .ftz makes of an operand or a result: a subnormal is a zero of its sign.
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

}  // namespace emu

namespace ptx {

// NOTE: the library's 2^x is more accurate than the instruction's 2 ulp.
inline float exp2_approx(float x) {
  ++::emu::current->exp_calls;
  return ::emu::flushed(exp2f(::emu::flushed(x)));
}

inline float rcp_approx(float x) { return ::emu::flushed(1.0f / ::emu::flushed(x)); }

inline double exp_f64(double x) {
  ++::emu::current->exp_calls;
  return ::exp(x);
}

inline float fma_rn(float a, float b, float c) { return ::emu::fma_rn(a, b, c); }

inline double fma_rn(double a, double b, double c) { return ::emu::fma_rn(a, b, c); }

inline unsigned int cvt_rna_tf32(float x, EMU_SITE) {
  ::emu::check_sm_80("cvt_rna_tf32", site);
  const unsigned int bits = ::emu::float_bits(x), magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fffffff;
  return (bits & 0x80000000) | ((magnitude + (magnitude < 0x7f800000 ? 0x1000 : 0)) & 0x7fffe000);
}

inline void cvt_f32_e4m3x2(float (&x)[2], unsigned int bits) {
  for (int i = 0; i < 2; ++i) {
    const unsigned int one = bits >> 8 * i, exponent = one >> 3 & 15, mantissa = one & 7;
    const float magnitude =
        exponent == 0 ? ldexpf(mantissa, -9) : ldexpf(8 + mantissa, static_cast<int>(exponent) - 10);
    x[i] = (one & 0x7f) == 0x7f ? ::emu::bits_float(0x7fffffff) : copysignf(magnitude, one & 0x80 ? -1.0f : 1.0f);
  }
}

template <class T>
inline unsigned int cvt_rn_x2(float low, float high, EMU_SITE) {
  ::emu::check_sm_80("cvt_rn_x2", site);
  return ::emu::CvtTo<T>::bits(low) | ::emu::CvtTo<T>::bits(high) << 16;
}

}  // namespace ptx
