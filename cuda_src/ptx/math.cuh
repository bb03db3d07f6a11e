// Arithmetic that C++ has no exact word for, one wrapper per instruction.
#pragma once

struct __half;
struct __nv_bfloat16;

namespace ptx {

// 2^x, at most 2 ulp, subnormals flushed; 2^-inf = +0.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-ex2
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, at most 1 ulp, subnormals flushed.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-rcp
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// e^x in float64, 1 ulp: a libdevice call (no instruction does it), here so that it is counted with exp2_approx.
__device__ __forceinline__ double exp_f64(double x) { return ::exp(x); }

// a * b + c rounded once; any NaN is 0x7fffffff.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-fma
__device__ __forceinline__ float fma_rn(float a, float b, float c) {
  float y;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(y) : "f"(a), "f"(b), "f"(c));
  return y;
}

// The same in float64.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-fma
__device__ __forceinline__ double fma_rn(double a, double b, double c) {
  double y;
  asm("fma.rn.f64 %0, %1, %2, %3;" : "=d"(y) : "d"(a), "d"(b), "d"(c));
  return y;
}

// x rounded to tf32, ties away from zero: float32 bits whose low 13 are 0; any NaN is 0x7fffffff (sm_80 and newer).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cvt
__device__ __forceinline__ unsigned int cvt_rna_tf32(float x) {
  unsigned int y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// Two numbers of e4m3 (4 bits of exponent, 3 of mantissa, no infinity), the low byte first: exact. sm_90 and newer
// convert both to float16 at a time, as sm_89 could, whose memory leaves time enough; before, their bits are those of a
// float32 but for the exponent's bias.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cvt
__device__ __forceinline__ void cvt_f32_e4m3x2(float (&x)[2], unsigned int bits) {
#if __CUDA_ARCH__ >= 900
  unsigned int pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<unsigned short>(bits)));
  asm("cvt.f32.f16 %0, %1;" : "=f"(x[0]) : "h"(static_cast<unsigned short>(pair)));
  asm("cvt.f32.f16 %0, %1;" : "=f"(x[1]) : "h"(static_cast<unsigned short>(pair >> 16)));
#else
  for (int i = 0; i < 2; ++i) {
    const unsigned int one = bits >> 8 * i, magnitude = one & 0x7f;
    const float value = __uint_as_float(magnitude << 20) * 0x1p120f;
    x[i] = magnitude == 0x7f ? __uint_as_float(0x7fffffff) : one & 0x80 ? -value : value;
  }
#endif
}

template <class T>
constexpr bool kCvtHalf = false;
template <>
constexpr bool kCvtHalf<__half> = true;
template <class T>
constexpr bool kCvtBfloat16 = false;
template <>
constexpr bool kCvtBfloat16<__nv_bfloat16> = true;

// Two values rounded to T, to nearest even, in one word: `low` in the low half (sm_80 and newer).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cvt
template <class T>
__device__ __forceinline__ unsigned int cvt_rn_x2(float low, float high) {
  static_assert(kCvtHalf<T> || kCvtBfloat16<T>, "T is __half or __nv_bfloat16");
  unsigned int word;
  if constexpr (kCvtHalf<T>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

}  // namespace ptx
