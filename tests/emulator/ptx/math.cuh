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

}  // namespace ptx
