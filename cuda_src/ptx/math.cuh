// Transcendental instructions, one wrapper each.
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

}  // namespace ptx
