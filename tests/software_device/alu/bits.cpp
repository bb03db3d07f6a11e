// Logic, shifts and bit fields (PTX ISA, "Logic and Shift Instructions"; bfe, bfi, popc, clz, bfind, brev of "Integer
// Arithmetic Instructions"; prmt).
#include <type_traits>

#include "../ptx/rule.hpp"
#include "lanes.hpp"

namespace soft {
namespace {

struct And {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a ^ b);
  }
};
struct Not {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(~a);
  }
};
struct LogicalNot {
  template <class T>
  T operator()(T a) const {
    return a == 0;
  }
};
template <class Operation>
Handler bits_one(const Variant& variant) {
  return for_bits(variant.type(), [](auto t) -> Handler { return fastest<one<decltype(t), Operation>>(); });
}
template <class Operation>
Handler bits_two(const Variant& variant) {
  return for_bits(variant.type(), [](auto t) -> Handler { return fastest<two<decltype(t), Operation>>(); });
}

// A shift by the width or more gives 0, or the sign.
template <class T>
void shift_left(Warp& warp, const Inst& instruction) {
  T* d = R<T>(warp, instruction.d);
  const T* a = R<T>(warp, instruction.a);
  const u32* b = R<u32>(warp, instruction.b);
  each(warp, d, [=](int lane) { return b[lane] >= 8 * sizeof(T) ? T(0) : static_cast<T>(u64(a[lane]) << b[lane]); });
}
template <class T>
void shift_right(Warp& warp, const Inst& instruction) {
  T* d = R<T>(warp, instruction.d);
  const T* a = R<T>(warp, instruction.a);
  const u32* b = R<u32>(warp, instruction.b);
  constexpr u32 kLast = 8 * sizeof(T) - 1;
  each(warp, d, [=](int lane) {
    if (!std::is_signed_v<T> && b[lane] > kLast) return T(0);
    return static_cast<T>(a[lane] >> (b[lane] > kLast ? kLast : b[lane]));
  });
}
Handler pick_shift_left(const Variant& variant) {
  return for_bits(variant.type(), [](auto t) -> Handler { return fastest<shift_left<decltype(t)>>(); });
}
Handler pick_shift_right(const Variant& variant) {
  return for_integer(variant.type(), [](auto t) -> Handler { return fastest<shift_right<decltype(t)>>(); });
}
template <bool left, bool wrap>
void funnel_shift(Warp& warp, const Inst& instruction) {
  ternary<u32>(warp, instruction, [](u32 low, u32 high, u32 count) {
    const u32 n = wrap ? count & 31 : count > 32 ? 32 : count;
    const u64 both = u64(high) << 32 | low;
    return static_cast<u32>(left ? both << n >> 32 : both >> n);
  });
}
Handler pick_funnel_shift(const Variant& variant) {
  if (variant.has("l")) return variant.has("wrap") ? funnel_shift<true, true> : funnel_shift<true, false>;
  return variant.has("wrap") ? funnel_shift<false, true> : funnel_shift<false, false>;
}

// Four bytes of eight; an index with bit 3 set gives the byte's sign eight times.
void permute(Warp& warp, const Inst& instruction) {
  ternary<u32>(warp, instruction, [](u32 a, u32 b, u32 selector) {
    const u64 both = u64(b) << 32 | a;
    u32 result = 0;
    for (int k = 0; k < 4; ++k) {
      const u32 index = selector >> (4 * k) & 15;
      u32 byte = both >> (8 * (index & 7)) & 255;
      if (index & 8) byte = byte & 128 ? 255 : 0;
      result |= byte << (8 * k);
    }
    return result;
  });
}
// The bytes that a mode takes for a selector of 0 to 3.
template <u32 c0, u32 c1, u32 c2, u32 c3>
void permute_mode(Warp& warp, const Inst& instruction) {
  ternary<u32>(warp, instruction, [](u32 a, u32 b, u32 selector) {
    constexpr u32 kBytes[4] = {c0, c1, c2, c3};
    const u64 both = u64(b) << 32 | a;
    u32 result = 0;
    for (int k = 0; k < 4; ++k)
      result |= static_cast<u32>(both >> (8 * (kBytes[selector & 3] >> (4 * k) & 7)) & 255) << (8 * k);
    return result;
  });
}
Handler pick_permute(const Variant& variant) {
  if (variant.has("f4e")) return permute_mode<0x3210, 0x4321, 0x5432, 0x6543>;
  if (variant.has("b4e")) return permute_mode<0x5670, 0x6701, 0x7012, 0x0123>;
  if (variant.has("rc8")) return permute_mode<0x0000, 0x1111, 0x2222, 0x3333>;
  if (variant.has("ecl")) return permute_mode<0x3210, 0x3211, 0x3222, 0x3333>;
  if (variant.has("ecr")) return permute_mode<0x0000, 0x1110, 0x2210, 0x3210>;
  if (variant.has("rc16")) return permute_mode<0x1010, 0x3232, 0x1010, 0x3232>;
  return permute;
}

// Bit k of the table is the result where a, b and c are the bits of k.
void logic_of_three(Warp& warp, const Inst& instruction) {
  const u32 table = static_cast<u32>(instruction.imm);
  ternary<u32>(warp, instruction, [table](u32 a, u32 b, u32 c) {
    u32 result = 0;
    for (int k = 0; k < 8; ++k)
      if (table >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return result;
  });
}

Handler pick_logic_of_three(const Variant&) { return fastest<logic_of_three>(); }

template <class T>
void extract_bits(Warp& warp, const Inst& instruction) {
  using Bits = std::make_unsigned_t<T>;
  T* d = R<T>(warp, instruction.d);
  const Bits* a = R<Bits>(warp, instruction.a);
  const u32 *b = R<u32>(warp, instruction.b), *c = R<u32>(warp, instruction.c);
  each(warp, d, [=](int lane) {
    const u32 last = 8 * sizeof(T) - 1, position = b[lane] & 255, length = c[lane] & 255;
    Bits sign = 0;
    if (std::is_signed_v<T> && length)
      sign = a[lane] >> (position + length - 1 > last ? last : position + length - 1) & 1;
    Bits result = 0;
    for (u32 k = 0; k <= last; ++k)
      result |= (k < length && position + k <= last ? a[lane] >> (position + k) & 1 : sign) << k;
    return static_cast<T>(result);
  });
}
template <class T>
void insert_bits(Warp& warp, const Inst& instruction) {
  T* d = R<T>(warp, instruction.d);
  const T *a = R<T>(warp, instruction.a), *b = R<T>(warp, instruction.b);
  const u32 *c = R<u32>(warp, instruction.c), *e = R<u32>(warp, instruction.e);
  each(warp, d, [=](int lane) {
    const u32 width = 8 * sizeof(T), position = c[lane] & 255, length = e[lane] & 255;
    if (position >= width) return b[lane];
    const T field = (length >= width ? ~T(0) : (T(1) << length) - 1) << position;
    return (b[lane] & ~field) | (a[lane] << position & field);
  });
}
Handler pick_extract_bits(const Variant& variant) {
  return for_integer(variant.type(), [](auto t) -> Handler { return fastest<extract_bits<decltype(t)>>(); });
}
Handler pick_insert_bits(const Variant& variant) {
  return variant.type().size == 4 ? fastest<insert_bits<u32>>() : fastest<insert_bits<u64>>();
}

template <class T>
void count_ones(Warp& warp, const Inst& instruction) {
  unary<u32, T>(warp, instruction, [](T a) { return static_cast<u32>(__builtin_popcountll(a)); });
}
template <class T>
void count_leading_zeros(Warp& warp, const Inst& instruction) {
  constexpr int kAbove = 64 - 8 * sizeof(T);
  unary<u32, T>(warp, instruction,
                [](T a) { return a ? static_cast<u32>(__builtin_clzll(a) - kAbove) : u32(8 * sizeof(T)); });
}
// The highest bit that differs from the sign, or how far it is from the top (.shiftamt); all ones where there is none.
template <class T, bool shift>
void find_highest(Warp& warp, const Inst& instruction) {
  unary<u32, T>(warp, instruction, [](T a) {
    if (std::is_signed_v<T> && a < 0) a = static_cast<T>(~a);
    if (a == 0) return ~u32(0);
    const u32 position = static_cast<u32>(63 - __builtin_clzll(static_cast<u64>(a)));
    return shift ? u32(8 * sizeof(T) - 1) - position : position;
  });
}
struct ReverseBits {
  template <class T>
  T operator()(T a) const {
    T result = 0;
    for (size_t k = 0; k < 8 * sizeof(T); ++k) result |= (a >> k & 1) << (8 * sizeof(T) - 1 - k);
    return result;
  }
};
Handler pick_count_ones(const Variant& variant) { return variant.type().size == 4 ? count_ones<u32> : count_ones<u64>; }
Handler pick_count_leading_zeros(const Variant& variant) {
  return variant.type().size == 4 ? count_leading_zeros<u32> : count_leading_zeros<u64>;
}
Handler pick_find_highest(const Variant& variant) {
  const bool shift = variant.has("shiftamt");
  return for_integer(variant.type(), [=](auto t) -> Handler {
    return shift ? find_highest<decltype(t), true> : find_highest<decltype(t), false>;
  });
}

}  // namespace

const Rules& bit_rules() {
  static const Rules rules = {
      {"and{.b16.b32.b64}", "d, a, b", bits_two<And>},
      {"or{.b16.b32.b64}", "d, a, b", bits_two<Or>},
      {"xor{.b16.b32.b64}", "d, a, b", bits_two<Xor>},
      {"not{.b16.b32.b64}", "d, a", bits_one<Not>},
      {"cnot{.b16.b32.b64}", "d, a", bits_one<LogicalNot>},
      {"shl{.b16.b32.b64}", "d, a, b:32", pick_shift_left},
      {"shr{.b16.b32.b64.u16.s16.u32.s32.u64.s64}", "d, a, b:32", pick_shift_right},
      {"shf{.l.r}{.clamp.wrap}.b32", "d, a, b, c", pick_funnel_shift},
      {"prmt.b32[.f4e.b4e.rc8.ecl.ecr.rc16]", "d, a, b, c", pick_permute},
      {"lop3.b32", "d, a, b, c, imm", pick_logic_of_three},
      {"bfe{.u32.s32.u64.s64}", "d, a, b:32, c:32", pick_extract_bits},
      {"bfi{.b32.b64}", "d, a, b, c:32, e:32", pick_insert_bits},
      {"popc{.b32.b64}", "d:32, a", pick_count_ones},
      {"clz{.b32.b64}", "d:32, a", pick_count_leading_zeros},
      {"bfind[.shiftamt]{.u32.s32.u64.s64}", "d:32, a", pick_find_highest},
      {"brev{.b32.b64}", "d, a", bits_one<ReverseBits>},
  };
  return rules;
}

}  // namespace soft
