// Arithmetic of single instructions that differ from what kernels' plain C++ does on the host.
#include <cmath>
#include <cstdint>
#include <cstring>

#include <device.hpp>

#include "fiber.hpp"

namespace emu {

namespace {

// Volatile, so that the compiler leaves the computation between the two changes of mode.
template <class T>
T fma_with_subnormals(T a, T b, T c) {
  volatile T factor = a;
  const uint64_t old = keep_subnormals();
  volatile T result = std::fma(static_cast<T>(factor), b, c);
  restore_float_mode(old);
  return result;
}

}  // namespace

float fma_rn(float a, float b, float c) {
  const float result = fma_with_subnormals(a, b, c);
  if (!std::isnan(result)) return result;
  const uint32_t bits = 0x7fffffff;
  float nan;
  memcpy(&nan, &bits, sizeof nan);
  return nan;
}

double fma_rn(double a, double b, double c) { return fma_with_subnormals(a, b, c); }

}  // namespace emu
