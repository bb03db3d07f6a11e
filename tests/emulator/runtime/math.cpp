// Arithmetic of single instructions that differ from what kernels' plain C++ does on the host.
#include <cmath>
#include <cstdint>
#include <cstring>

#include <device.hpp>

namespace emu {

float fma_rn(float a, float b, float c) {
  const float result = std::fma(a, b, c);
  if (!std::isnan(result)) return result;
  const uint32_t bits = 0x7fffffff;
  float nan;
  memcpy(&nan, &bits, sizeof nan);
  return nan;
}

double fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

}  // namespace emu
