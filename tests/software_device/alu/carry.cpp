// Integers of more than one register: a carry that one instruction leaves and the next one takes (PTX ISA, "Extended-
// Precision Integer Arithmetic Instructions"). The carry is one bit a lane, kept as a predicate is.
#include <type_traits>

#include "../ptx/rule.hpp"
#include "lanes.hpp"

namespace soft {
namespace {

enum Operation { kAdd, kSubtract, kMultiplyAddLow, kMultiplyAddHigh };
enum Flag : u8 { kTakes = 1, kLeaves = 2 };

// Carries and borrows do not depend on the sign: all is unsigned but the upper half of a product.
template <class T, Operation operation>
void with_carry(Warp& warp, const Inst& instruction) {
  using U = std::make_unsigned_t<T>;
  using Double = std::conditional_t<std::is_signed_v<T>, s128, u128>;
  U* d = R<U>(warp, instruction.d);
  const T *a = R<T>(warp, instruction.a), *b = R<T>(warp, instruction.b);
  const T* c = operation >= kMultiplyAddLow ? R<T>(warp, instruction.c) : nullptr;
  const u32 before = instruction.flag & kTakes ? predicate(warp, instruction.e) : 0;
  u32 after = 0;
  lanes(warp, [&](int lane) {
    const u128 carry = before >> lane & 1;
    U first = static_cast<U>(a[lane]), second = static_cast<U>(b[lane]);
    if constexpr (operation == kMultiplyAddLow) first = static_cast<U>(u128(first) * second);
    if constexpr (operation == kMultiplyAddHigh)
      first = static_cast<U>(Double(a[lane]) * Double(b[lane]) >> (8 * sizeof(T)));
    if constexpr (operation >= kMultiplyAddLow) second = static_cast<U>(c[lane]);
    const u128 result = operation == kSubtract ? u128(first) - second - carry : u128(first) + second + carry;
    after |= static_cast<u32>(result >> (8 * sizeof(T)) & 1) << lane;
    d[lane] = static_cast<U>(result);
  });
  if (instruction.flag & kLeaves) set_predicate(warp, instruction.e, after);
}

template <Operation operation>
Handler pick(const Variant& variant) {
  const bool is_signed = variant.type().kind == Type::kSigned;
  if (variant.type().size == 4) return is_signed ? with_carry<s32, operation> : with_carry<u32, operation>;
  return is_signed ? with_carry<s64, operation> : with_carry<u64, operation>;
}

void use_carry(Builder& builder, Inst& instruction, const Variant& variant, const std::vector<Operand>&) {
  instruction.e = builder.carry();
  if (variant.words[0].back() == 'c') instruction.flag |= kTakes;  // addc, subc, madc
  if (variant.has("cc")) instruction.flag |= kLeaves;
}

}  // namespace

const Rules& carry_rules() {
  static const Rules rules = {
      {"add.cc{.u32.s32.u64.s64}", "d, a, b", pick<kAdd>, use_carry},
      {"addc[.cc]{.u32.s32.u64.s64}", "d, a, b", pick<kAdd>, use_carry},
      {"sub.cc{.u32.s32.u64.s64}", "d, a, b", pick<kSubtract>, use_carry},
      {"subc[.cc]{.u32.s32.u64.s64}", "d, a, b", pick<kSubtract>, use_carry},
      {"mad.lo.cc{.u32.s32.u64.s64}", "d, a, b, c", pick<kMultiplyAddLow>, use_carry},
      {"mad.hi.cc{.u32.s32.u64.s64}", "d, a, b, c", pick<kMultiplyAddHigh>, use_carry},
      {"madc.lo[.cc]{.u32.s32.u64.s64}", "d, a, b, c", pick<kMultiplyAddLow>, use_carry},
      {"madc.hi[.cc]{.u32.s32.u64.s64}", "d, a, b, c", pick<kMultiplyAddHigh>, use_carry},
  };
  return rules;
}

}  // namespace soft
