// Integer arithmetic (PTX ISA, "Integer Arithmetic Instructions").
#include <limits>
#include <type_traits>

#include "../ptx/rule.hpp"
#include "lanes.hpp"

namespace soft {
namespace {

// Arithmetic that wraps around: unsigned, and of 32 bits at least, so that C++ promotes nothing to int.
template <class T>
using Work = std::conditional_t<(sizeof(T) < 4), u32, std::make_unsigned_t<T>>;

template <class T>
struct Twice;
template <>
struct Twice<u16> {
  using Type = u32;
};
template <>
struct Twice<s16> {
  using Type = s32;
};
template <>
struct Twice<u32> {
  using Type = u64;
};
template <>
struct Twice<s32> {
  using Type = s64;
};
template <>
struct Twice<u64> {
  using Type = u128;
};
template <>
struct Twice<s64> {
  using Type = s128;
};
template <class T>
using Wide = typename Twice<T>::Type;

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(Work<T>(a) + Work<T>(b));
  }
};
struct Subtract {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(Work<T>(a) - Work<T>(b));
  }
};
struct MultiplyLow {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(Work<T>(a) * Work<T>(b));
  }
};
struct MultiplyHigh {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(Wide<T>(a) * Wide<T>(b) >> (8 * sizeof(T)));
  }
};
struct Minimum {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Maximum {
  template <class T>
  T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
// What a division by zero gives is unspecified; these are the values that GPUs return. The quotient of the lowest
// number and -1 wraps around.
struct Divide {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return static_cast<T>(-1);
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(Work<T>(0) - Work<T>(a));
    return static_cast<T>(a / b);
  }
};
struct Remainder {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
struct Negate {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(Work<T>(0) - Work<T>(a));
  }
};
struct Absolute {
  template <class T>
  T operator()(T a) const {
    return a < 0 ? Negate()(a) : a;
  }
};
// add.sat and sub.sat are of .s32 only.
s32 saturate(s64 value) {
  const s64 low = std::numeric_limits<s32>::min(), high = std::numeric_limits<s32>::max();
  return static_cast<s32>(value < low ? low : value > high ? high : value);
}
struct AddSaturated {
  s32 operator()(s32 a, s32 b) const { return saturate(s64(a) + b); }
};
struct SubtractSaturated {
  s32 operator()(s32 a, s32 b) const { return saturate(s64(a) - b); }
};

template <class Operation>
Handler integer_one(const Variant& variant) {
  return for_integer(variant.type(), [](auto t) -> Handler { return fastest<one<decltype(t), Operation>>(); });
}
template <class Operation>
Handler integer_two(const Variant& variant) {
  return for_integer(variant.type(), [](auto t) -> Handler { return fastest<two<decltype(t), Operation>>(); });
}
template <Handler handler>
Handler just(const Variant&) {
  return handler;
}

template <class T>
void multiply_wide(Warp& warp, const Inst& instruction) {
  Wide<T>* d = R<Wide<T>>(warp, instruction.d);
  const T *a = R<T>(warp, instruction.a), *b = R<T>(warp, instruction.b);
  each(warp, d, [=](int lane) { return static_cast<Wide<T>>(Wide<T>(a[lane]) * Wide<T>(b[lane])); });
}
template <class T>
void multiply_add_wide(Warp& warp, const Inst& instruction) {
  Wide<T>* d = R<Wide<T>>(warp, instruction.d);
  const T *a = R<T>(warp, instruction.a), *b = R<T>(warp, instruction.b);
  const Wide<T>* c = R<Wide<T>>(warp, instruction.c);
  each(warp, d, [=](int lane) { return Add()(static_cast<Wide<T>>(Wide<T>(a[lane]) * Wide<T>(b[lane])), c[lane]); });
}
template <class T, class Multiply>
void multiply_add(Warp& warp, const Inst& instruction) {
  ternary<T>(warp, instruction, [](T a, T b, T c) { return Add()(Multiply()(a, b), c); });
}
template <template <class> class Make>
Handler widening(const Variant& variant) {
  const bool is_signed = variant.type().kind == Type::kSigned;
  if (variant.type().size == 2) return is_signed ? Make<s16>::handler() : Make<u16>::handler();
  return is_signed ? Make<s32>::handler() : Make<u32>::handler();
}
template <class T>
struct MultiplyWide {
  static Handler handler() { return fastest<multiply_wide<T>>(); }
};
template <class T>
struct MultiplyAddWide {
  static Handler handler() { return fastest<multiply_add_wide<T>>(); }
};
template <class Multiply>
Handler integer_multiply_add(const Variant& variant) {
  return for_integer(variant.type(), [](auto t) -> Handler { return fastest<multiply_add<decltype(t), Multiply>>(); });
}

// d = c + |a - b|
template <class T>
void sum_of_differences(Warp& warp, const Inst& instruction) {
  ternary<T>(warp, instruction, [](T a, T b, T c) { return Add()(c, a < b ? Subtract()(b, a) : Subtract()(a, b)); });
}
Handler pick_sum_of_differences(const Variant& variant) {
  return for_integer(variant.type(), [](auto t) -> Handler { return fastest<sum_of_differences<decltype(t)>>(); });
}

template <bool a_signed, bool b_signed>
void dot_of_bytes(Warp& warp, const Inst& instruction) {
  ternary<u32>(warp, instruction, [](u32 a, u32 b, u32 c) {
    for (int k = 0; k < 4; ++k) {
      const u8 x = static_cast<u8>(a >> (8 * k)), y = static_cast<u8>(b >> (8 * k));
      c += static_cast<u32>((a_signed ? s32(static_cast<s8>(x)) : s32(x)) *
                            (b_signed ? s32(static_cast<s8>(y)) : s32(y)));
    }
    return c;
  });
}
Handler pick_dot_of_bytes(const Variant& variant) {
  const bool a = variant.type(1).kind == Type::kSigned, b = variant.type().kind == Type::kSigned;
  return a   ? (b ? dot_of_bytes<true, true> : dot_of_bytes<true, false>)
         : b ? dot_of_bytes<false, true>
             : dot_of_bytes<false, false>;
}

}  // namespace

const Rules& integer_rules() {
  static const Rules rules = {
      {"add{.u16.s16.u32.s32.u64.s64}", "d, a, b", integer_two<Add>},
      {"add.sat.s32", "d, a, b", just<two<s32, AddSaturated>>},
      {"sub{.u16.s16.u32.s32.u64.s64}", "d, a, b", integer_two<Subtract>},
      {"sub.sat.s32", "d, a, b", just<two<s32, SubtractSaturated>>},
      {"mul.lo{.u16.s16.u32.s32.u64.s64}", "d, a, b", integer_two<MultiplyLow>},
      {"mul.hi{.u16.s16.u32.s32.u64.s64}", "d, a, b", integer_two<MultiplyHigh>},
      {"mul.wide{.u16.s16.u32.s32}", "d:2t, a, b", widening<MultiplyWide>},
      {"mad.lo{.u16.s16.u32.s32.u64.s64}", "d, a, b, c", integer_multiply_add<MultiplyLow>},
      {"mad.hi{.u16.s16.u32.s32.u64.s64}", "d, a, b, c", integer_multiply_add<MultiplyHigh>},
      {"mad.wide{.u16.s16.u32.s32}", "d:2t, a, b, c:2t", widening<MultiplyAddWide>},
      {"sad{.u16.s16.u32.s32.u64.s64}", "d, a, b, c", pick_sum_of_differences},
      {"div{.u16.s16.u32.s32.u64.s64}", "d, a, b", integer_two<Divide>},
      {"rem{.u16.s16.u32.s32.u64.s64}", "d, a, b", integer_two<Remainder>},
      {"abs{.s16.s32.s64}", "d, a", integer_one<Absolute>},
      {"neg{.s16.s32.s64}", "d, a", integer_one<Negate>},
      {"min{.u16.s16.u32.s32.u64.s64}", "d, a, b", integer_two<Minimum>},
      {"max{.u16.s16.u32.s32.u64.s64}", "d, a, b", integer_two<Maximum>},
      {"dp4a{.u32.s32}{.u32.s32}", "d, a, b, c", pick_dot_of_bytes},
  };
  return rules;
}

}  // namespace soft
