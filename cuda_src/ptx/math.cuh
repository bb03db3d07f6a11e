// Arithmetic that C++ has no exact word for, one wrapper an instruction.
#pragma once

namespace ptx {

// 2^x, at most 2 ulp, subnormals flushed; 2^-inf = +0.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-ex2
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// e^x in float64, 1 ulp: a libdevice call (no instruction does it), here so that it is counted with exp2_approx.
__device__ __forceinline__ double exp_f64(double x) { return ::exp(x); }

// a * b + c rounded once, subnormals kept although the library compiles with -ftz=true; any NaN is 0x7fffffff.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-fma
__device__ __forceinline__ float fma_rn(float a, float b, float c) {
  float y;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(y) : "f"(a), "f"(b), "f"(c));
  return y;
}

// The same in float64, which has no flushing.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-fma
__device__ __forceinline__ double fma_rn(double a, double b, double c) {
  double y;
  asm("fma.rn.f64 %0, %1, %2, %3;" : "=d"(y) : "d"(a), "d"(b), "d"(c));
  return y;
}

}  // namespace ptx
