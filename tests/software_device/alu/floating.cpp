// Arithmetic on .f32 and .f64 that IEEE 754 defines to the last bit (PTX ISA, "Floating Point Instructions"), in four
// rounding directions, with .ftz and .sat.
#include <cmath>
#include <type_traits>

#include "../ptx/rule.hpp"
#include "directed.hpp"
#include "lanes.hpp"

namespace soft {
namespace {

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Subtract {
  template <class T>
  T operator()(T a, T b) const {
    return a - b;
  }
};
struct Multiply {
  template <class T>
  T operator()(T a, T b) const {
    return a * b;
  }
};
struct Divide {
  template <class T>
  T operator()(T a, T b) const {
    return a / b;
  }
};
struct FusedMultiplyAdd {
  template <class T>
  T operator()(T a, T b, T c) const {
    return std::fma(a, b, c);
  }
};
struct SquareRoot {
  template <class T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct Reciprocal {
  template <class T>
  T operator()(T a) const {
    return 1 / a;
  }
};

// NaN results. Of .f32: one NaN, whatever came in. Of .f64: the first NaN operand, made quiet; else the default NaN.
template <class... Operands>
float with_nan(float result, Operands...) {
  return canon(result);
}
inline double first_nan() { return reinterpret<double>(Format<double>::kNaN); }
template <class... Others>
double first_nan(double operand, Others... others) {
  const double quiet = reinterpret<double>(reinterpret<u64>(operand) | u64(1) << 51), other = first_nan(others...);
  return operand != operand ? quiet : other;
}
template <class... Operands>
double with_nan(double result, Operands... operands) {
  const double nan = first_nan(operands...);
  return result != result ? nan : result;
}

// .sat: to [0, 1], and NaN to +0.
inline float saturate(float value) { return value > 0 ? (value < 1 ? value : 1) : 0; }

enum Flag : u8 { kFlush = 1, kSaturate = 2 };

template <bool flush, class Operation, class... Ts>
inline float compute(Operation operation, float a, Ts... others) {
  if constexpr (flush) return ftz(operation(ftz(a), ftz(others)...));
  return operation(a, others...);
}
template <bool flush, class Operation, class... Ts>
inline double compute(Operation operation, double a, Ts... others) {
  return operation(a, others...);
}

// The two common cases have loops of their own, which the compiler can turn into vector instructions.
template <class T, bool flush, class Operation, class... Registers>
void nearest(Warp& warp, const Inst& instruction, Registers... operands) {
  T* d = R<T>(warp, instruction.d);
  each(warp, d, [=](int lane) { return with_nan(compute<flush>(Operation(), operands[lane]...), operands[lane]...); });
}
template <class T, class Operation, class... Registers>
void general(Warp& warp, const Inst& instruction, Registers... operands) {
  T* d = R<T>(warp, instruction.d);
  const Rounding rounding = static_cast<Rounding>(instruction.rnd);
  const auto operation = [=](auto... values) { return directed(rounding, Operation(), values...); };
  lanes(warp, [&](int lane) {
    T result = instruction.flag & kFlush ? compute<true>(operation, operands[lane]...)
                                         : compute<false>(operation, operands[lane]...);
    result = with_nan(result, operands[lane]...);
    if constexpr (std::is_same_v<T, float>)
      if (instruction.flag & kSaturate) result = saturate(result);
    d[lane] = result;
  });
}

enum Way { kNearest, kNearestFlushed, kGeneral };

template <class T, Way way, class Operation, class... Registers>
void run(Warp& warp, const Inst& instruction, Registers... operands) {
  if constexpr (way == kGeneral)
    general<T, Operation>(warp, instruction, operands...);
  else
    nearest<T, way == kNearestFlushed, Operation>(warp, instruction, operands...);
}
template <class T, Way way, class Operation, int operands>
void arithmetic(Warp& warp, const Inst& instruction) {
  const T *a = R<T>(warp, instruction.a), *b = R<T>(warp, instruction.b), *c = R<T>(warp, instruction.c);
  if constexpr (operands == 1) run<T, way, Operation>(warp, instruction, a);
  if constexpr (operands == 2) run<T, way, Operation>(warp, instruction, a, b);
  if constexpr (operands == 3) run<T, way, Operation>(warp, instruction, a, b, c);
}
template <class Operation, int operands>
Handler pick(const Variant& variant) {
  const bool general = variant.rounding() != Rounding::kNearestEven || variant.has("sat");
  if (variant.type().size == 8) {
    if (general) return arithmetic<double, kGeneral, Operation, operands>;
    return fastest<arithmetic<double, kNearest, Operation, operands>>();
  }
  if (general) return arithmetic<float, kGeneral, Operation, operands>;
  if (variant.has("ftz")) return fastest<arithmetic<float, kNearestFlushed, Operation, operands>>();
  return fastest<arithmetic<float, kNearest, Operation, operands>>();
}

// How an instruction of this file rounds, flushes and saturates.
void set_modifiers(Builder&, Inst& instruction, const Variant& variant, const std::vector<Operand>&) {
  instruction.rnd = static_cast<u8>(variant.rounding());
  instruction.flag = (variant.has("ftz") ? kFlush : 0) | (variant.has("sat") ? kSaturate : 0);
}

// min and max: the number where only one is, unless .NaN; -0 is less than +0.
template <class T, bool maximum, bool flush, bool keep_nan, bool xor_sign>
void select(Warp& warp, const Inst& instruction) {
  binary<T>(warp, instruction, [](T a, T b) {
    if constexpr (flush) {
      a = ftz(a);
      b = ftz(b);
    }
    const bool negative = xor_sign && std::signbit(a) != std::signbit(b);
    if (xor_sign) {
      a = std::fabs(a);
      b = std::fabs(b);
    }
    const bool first = a < b || (a == b && std::signbit(a));
    T result = first != maximum ? a : b;
    if (a != a) result = keep_nan ? a : b;
    if (b != b) result = keep_nan ? b : a;
    result = with_nan(result, a, b);
    return negative && result == result ? -result : result;
  });
}
template <class T, bool maximum, bool flush>
Handler pick_select_of(const Variant& variant) {
  if (variant.has("xorsign"))
    return variant.has("NaN") ? select<T, maximum, flush, true, true>
                              : fastest<select<T, maximum, flush, false, true>>();
  return variant.has("NaN") ? select<T, maximum, flush, true, false>
                            : fastest<select<T, maximum, flush, false, false>>();
}
template <bool maximum>
Handler pick_select(const Variant& variant) {
  if (variant.type().size == 8) return pick_select_of<double, maximum, false>(variant);
  return variant.has("ftz") ? pick_select_of<float, maximum, true>(variant)
                            : pick_select_of<float, maximum, false>(variant);
}

// neg, abs and copysign move the sign only: a NaN keeps its bits.
template <class T, bool negate, bool flush>
void change_sign(Warp& warp, const Inst& instruction) {
  using Bits = typename Format<T>::Bits;
  constexpr Bits kSign = Bits(1) << (8 * sizeof(T) - 1);
  unary<T, T>(warp, instruction, [](T a) {
    if constexpr (flush) a = ftz(a);
    const Bits all = reinterpret<Bits>(a);
    return reinterpret<T>(static_cast<Bits>(negate ? all ^ kSign : all & ~kSign));
  });
}
template <bool negate>
Handler pick_change_sign(const Variant& variant) {
  if (variant.type().size == 8) return change_sign<double, negate, false>;
  return variant.has("ftz") ? fastest<change_sign<float, negate, true>>()
                            : fastest<change_sign<float, negate, false>>();
}
template <class Bits>
void copy_sign(Warp& warp, const Inst& instruction) {
  constexpr Bits kSign = Bits(1) << (8 * sizeof(Bits) - 1);
  binary<Bits>(warp, instruction, [](Bits a, Bits b) { return (a & kSign) | (b & ~kSign); });
}
Handler pick_copy_sign(const Variant& variant) { return variant.type().size == 8 ? copy_sign<u64> : copy_sign<u32>; }

}  // namespace

const Rules& floating_rules() {
  static const Rules rules = {
      {"add[.rn.rz.rm.rp][.ftz][.sat].f32", "d, a, b", pick<Add, 2>, set_modifiers},
      {"add[.rn.rz.rm.rp].f64", "d, a, b", pick<Add, 2>, set_modifiers},
      {"sub[.rn.rz.rm.rp][.ftz][.sat].f32", "d, a, b", pick<Subtract, 2>, set_modifiers},
      {"sub[.rn.rz.rm.rp].f64", "d, a, b", pick<Subtract, 2>, set_modifiers},
      {"mul[.rn.rz.rm.rp][.ftz][.sat].f32", "d, a, b", pick<Multiply, 2>, set_modifiers},
      {"mul[.rn.rz.rm.rp].f64", "d, a, b", pick<Multiply, 2>, set_modifiers},
      {"div{.rn.rz.rm.rp}[.ftz].f32", "d, a, b", pick<Divide, 2>, set_modifiers},
      {"div{.rn.rz.rm.rp}.f64", "d, a, b", pick<Divide, 2>, set_modifiers},
      {"fma{.rn.rz.rm.rp}[.ftz][.sat].f32", "d, a, b, c", pick<FusedMultiplyAdd, 3>, set_modifiers},
      {"fma{.rn.rz.rm.rp}.f64", "d, a, b, c", pick<FusedMultiplyAdd, 3>, set_modifiers},
      {"mad{.rn.rz.rm.rp}[.ftz][.sat].f32", "d, a, b, c", pick<FusedMultiplyAdd, 3>, set_modifiers},
      {"mad{.rn.rz.rm.rp}.f64", "d, a, b, c", pick<FusedMultiplyAdd, 3>, set_modifiers},
      {"rcp{.rn.rz.rm.rp}[.ftz].f32", "d, a", pick<Reciprocal, 1>, set_modifiers},
      {"rcp{.rn.rz.rm.rp}.f64", "d, a", pick<Reciprocal, 1>, set_modifiers},
      {"sqrt{.rn.rz.rm.rp}[.ftz].f32", "d, a", pick<SquareRoot, 1>, set_modifiers},
      {"sqrt{.rn.rz.rm.rp}.f64", "d, a", pick<SquareRoot, 1>, set_modifiers},
      {"min[.ftz][.NaN].f32", "d, a, b", pick_select<false>},
      {"min[.ftz][.NaN].xorsign.abs.f32", "d, a, b", pick_select<false>},
      {"min.f64", "d, a, b", pick_select<false>},
      {"max[.ftz][.NaN].f32", "d, a, b", pick_select<true>},
      {"max[.ftz][.NaN].xorsign.abs.f32", "d, a, b", pick_select<true>},
      {"max.f64", "d, a, b", pick_select<true>},
      {"neg[.ftz].f32", "d, a", pick_change_sign<true>},
      {"neg.f64", "d, a", pick_change_sign<true>},
      {"abs[.ftz].f32", "d, a", pick_change_sign<false>},
      {"abs.f64", "d, a", pick_change_sign<false>},
      {"copysign{.f32.f64}", "d, a, b", pick_copy_sign},
  };
  return rules;
}

}  // namespace soft
