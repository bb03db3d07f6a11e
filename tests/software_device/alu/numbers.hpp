// Number formats of PTX, and the conversion between them by one rounding in any direction (PTX ISA, "Floating Point
// Instructions" and "cvt"). All of it in integers: the same bits on every host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace soft {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using u128 = unsigned __int128;
using s128 = __int128;

// .rn, .rz, .rm, .rp and .rna; the numbers are those of Inst::rnd.
enum class Rounding : u8 { kNearestEven, kZero, kDown, kUp, kNearestAway };

template <class To, class From>
inline To reinterpret(From value) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

inline float f32(u32 bits) { return reinterpret<float>(bits); }
inline u32 bits(float value) { return reinterpret<u32>(value); }

struct half {  // .f16
  u16 b;
};
struct bfloat {  // .bf16
  u16 b;
};

// NaN: what an instruction that makes numbers of this format returns whatever the NaN was that came in.
template <class T>
struct Format;
template <>
struct Format<half> {
  using Bits = u16;
  static constexpr int kMantissa = 10, kBias = 15;
  static constexpr Bits kNaN = 0x7fff;
};
template <>
struct Format<bfloat> {
  using Bits = u16;
  static constexpr int kMantissa = 7, kBias = 127;
  static constexpr Bits kNaN = 0x7fff;
};
template <>
struct Format<float> {
  using Bits = u32;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr Bits kNaN = 0x7fffffff;
};
template <>
struct Format<double> {
  using Bits = u64;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr Bits kNaN = 0xfff8000000000000;
};

template <class T>
constexpr bool kIsFloating = std::is_floating_point_v<T> || std::is_same_v<T, half> || std::is_same_v<T, bfloat>;

// The finite number (-1)^negative * mantissa * 2^exponent.
struct Exact {
  bool negative;
  u64 mantissa;
  int exponent;
};

template <class T>
inline Exact exact(T value) {
  if constexpr (kIsFloating<T>) {
    using F = Format<T>;
    using Bits = typename F::Bits;
    const Bits all = reinterpret<Bits>(value), fraction = all & ((Bits(1) << F::kMantissa) - 1);
    const int exponent = static_cast<int>(all >> F::kMantissa & (2 * F::kBias + 1));
    const bool negative = all >> (8 * sizeof(T) - 1);
    if (exponent == 0) return {negative, fraction, 1 - F::kBias - F::kMantissa};
    return {negative, fraction | u64(1) << F::kMantissa, exponent - F::kBias - F::kMantissa};
  } else {
    const bool negative = value < 0;
    return {negative, negative ? u64(0) - static_cast<u64>(static_cast<s64>(value)) : static_cast<u64>(value), 0};
  }
}

// Whether a number that lies between two neighbours goes to the one further from zero: `rest` is how far it is above
// the lower one, `middle` the half of their distance.
inline bool rounds_away(Rounding rounding, bool negative, bool odd, u64 rest, u64 middle) {
  switch (rounding) {
    case Rounding::kNearestEven:
      return rest > middle || (rest == middle && odd);
    case Rounding::kNearestAway:
      return rest >= middle;
    case Rounding::kDown:
      return negative && rest != 0;
    case Rounding::kUp:
      return !negative && rest != 0;
    default:
      return false;
  }
}

template <class T>
inline T from_bits(u64 bits) {
  return reinterpret<T>(static_cast<typename Format<T>::Bits>(bits));
}

// `value` in the format T, rounded once.
template <class T>
inline T round_to(Exact value, Rounding rounding) {
  using F = Format<T>;
  const u64 sign = u64(value.negative) << (8 * sizeof(T) - 1);
  if (value.mantissa == 0) return from_bits<T>(sign);
  const int magnitude = 63 - __builtin_clzll(value.mantissa) + value.exponent;
  // Exponent of the last bit that is kept; a subnormal result keeps fewer of them.
  const int last = (magnitude < 1 - F::kBias ? 1 - F::kBias : magnitude) - F::kMantissa;
  const int shift = last - value.exponent;
  u64 kept = 0;
  if (shift <= 0) {
    kept = value.mantissa << -shift;
  } else {
    u64 rest = value.mantissa, middle = ~u64(0);  // a shift of more than 64: less than the half
    if (shift <= 64) middle = u64(1) << (shift - 1);
    if (shift < 64) {
      kept = value.mantissa >> shift;
      rest = value.mantissa & ((u64(1) << shift) - 1);
    }
    if (shift > 64) rest = 1;
    if (rounds_away(rounding, value.negative, kept & 1, rest, middle)) ++kept;
  }
  // The hidden bit of `kept` adds one to the exponent, and so does a carry out of the mantissa.
  const u64 infinity = u64(2 * F::kBias + 1) << F::kMantissa;
  u64 result = (u64(last + F::kMantissa + F::kBias - 1) << F::kMantissa) + kept;
  if (result >= infinity || magnitude > F::kBias) {
    const bool to_infinity = rounds_away(rounding, value.negative, true, 1, 1);
    result = to_infinity ? infinity : infinity - 1;
  }
  return from_bits<T>(sign | result);
}

template <class T>
inline bool is_nan(T value) {
  using F = Format<T>;
  using Bits = typename F::Bits;
  const Bits infinity = static_cast<Bits>(Bits(2 * F::kBias + 1) << F::kMantissa);
  return static_cast<Bits>(reinterpret<Bits>(value) & (Bits(~Bits(0)) >> 1)) > infinity;
}

template <class T>
inline bool is_infinite(T value) {
  using F = Format<T>;
  using Bits = typename F::Bits;
  return static_cast<Bits>(reinterpret<Bits>(value) << 1) ==
         static_cast<Bits>(Bits(2 * F::kBias + 1) << (F::kMantissa + 1));
}

// From one floating-point format, or an integer, to a floating-point one.
template <class To, class From>
inline To round_number(From value, Rounding rounding) {
  if constexpr (kIsFloating<From>) {
    using F = Format<To>;
    if (is_nan(value)) return from_bits<To>(F::kNaN);
    const Exact number = exact(value);
    if (is_infinite(value)) {
      return from_bits<To>(u64(number.negative) << (8 * sizeof(To) - 1) | u64(2 * F::kBias + 1) << F::kMantissa);
    }
    return round_to<To>(number, rounding);
  } else {
    return round_to<To>(exact(value), rounding);
  }
}

inline half to_half(float value, int rounding = 0) {
  return round_number<half>(value, static_cast<Rounding>(rounding));
}
inline bfloat to_bf(float value, int rounding = 0) {
  return round_number<bfloat>(value, static_cast<Rounding>(rounding));
}

// Widening is exact. The product with 2^112 moves the exponent from one bias to the other, also of subnormals.
inline float to_f(half value) {
  const u32 magnitude = value.b & 0x7fffu, sign = u32(value.b & 0x8000u) << 16;
  const u32 finite = bits(f32(magnitude << 13) * 0x1p112f), other = 0x7f800000u | (magnitude & 0x3ffu) << 13;
  return f32(sign | (magnitude >= 0x7c00u ? other : finite));
}
inline float to_f(bfloat value) { return f32(u32(value.b) << 16); }

// .ftz: a subnormal becomes zero of its sign.
inline float ftz(float value) {
  const u32 all = bits(value);
  return (all & 0x7f800000u) == 0 ? f32(all & 0x80000000u) : value;
}

// Arithmetic on .f32 returns one NaN, whatever NaN came in.
inline float canon(float value) { return value != value ? f32(Format<float>::kNaN) : value; }

}  // namespace soft
