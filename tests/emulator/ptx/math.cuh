// Twin of cuda_src/ptx/math.cuh.
#pragma once

namespace ptx {

// NOTE: runs with subnormals flushed, as .ftz does; the library's 2^x is more accurate than the instruction's 2 ulp.
inline float exp2_approx(float x) {
  ++::emu::current->exp_calls;
  return exp2f(x);
}

inline double exp_f64(double x) {
  ++::emu::current->exp_calls;
  return ::exp(x);
}

inline float fma_rn(float a, float b, float c) { return ::emu::fma_rn(a, b, c); }

inline double fma_rn(double a, double b, double c) { return ::emu::fma_rn(a, b, c); }

}  // namespace ptx
