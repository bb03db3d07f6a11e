// Rounding float and double to a 16-bit format in integer arithmetic: exact whatever the host's rounding or flush mode.
#pragma once

namespace emu {

// Rounds to nearest even, from an IEEE format of kFrom explicit mantissa bits and exponent bias kFromBias to a 16-bit
// one of kTo mantissa bits and bias kToBias. NaN becomes `nan`, as the conversion instruction makes it.
template <class Bits, int kFrom, int kFromBias, int kTo, int kToBias>
inline unsigned short round_to_16(Bits bits, unsigned short nan) {
  constexpr int kTotal = sizeof(Bits) * 8;
  constexpr int kMaxExponent = (1 << (15 - kTo)) - 1;
  const unsigned short sign = static_cast<unsigned short>(bits >> (kTotal - 1) << 15);
  const Bits magnitude = bits & ((Bits(1) << (kTotal - 1)) - 1);
  const Bits infinity = Bits(2 * kFromBias + 1) << kFrom;
  if (magnitude > infinity) return nan;
  if (magnitude == infinity) return sign | static_cast<unsigned short>(kMaxExponent << kTo);

  int exponent = static_cast<int>(magnitude >> kFrom);
  Bits mantissa = magnitude & ((Bits(1) << kFrom) - 1);
  if (exponent == 0) {
    exponent = 1;  // subnormal: no hidden bit
  } else {
    mantissa |= Bits(1) << kFrom;
  }
  int target = exponent - kFromBias + kToBias;
  int shift = kFrom - kTo;
  if (target < 1) {  // a subnormal result keeps fewer bits
    shift += 1 - target;
    target = 1;
  }
  if (shift > kFrom + 2) return sign;  // less than half the smallest subnormal
  const Bits rest = mantissa & ((Bits(1) << shift) - 1), half = Bits(1) << (shift - 1);
  Bits kept = mantissa >> shift;
  if (rest > half || (rest == half && (kept & 1))) ++kept;
  // The hidden bit of `kept`, if there, adds the first exponent; a carry out of the mantissa adds one more.
  const Bits result = (Bits(target - 1) << kTo) + kept;
  if (result >= Bits(kMaxExponent) << kTo) return sign | static_cast<unsigned short>(kMaxExponent << kTo);
  return sign | static_cast<unsigned short>(result);
}

inline unsigned int float_bits(float x) {
  unsigned int bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline unsigned long long double_bits(double x) {
  unsigned long long bits;
  __builtin_memcpy(&bits, &x, 8);
  return bits;
}

inline float bits_float(unsigned int bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

}  // namespace emu
