// Comparisons, and what chooses by them (PTX ISA, "Comparison and Selection Instructions", setp, set, selp, slct,
// testp; logic on predicates).
#include <cmath>
#include <map>
#include <type_traits>

#include "../ptx/rule.hpp"
#include "lanes.hpp"

namespace soft {
namespace {

enum Comparison { kEqual, kNotEqual, kLess, kLessEqual, kGreater, kGreaterEqual, kNumbers, kNaN, kComparisons };
struct Compare {
  Comparison comparison;
  bool unordered;  // equ, neu, ltu, ...: true where an operand is NaN
};
const std::map<std::string, Compare>& comparisons() {
  static const std::map<std::string, Compare> all = {
      {"eq", {kEqual, false}},        {"ne", {kNotEqual, false}},  {"lt", {kLess, false}},
      {"le", {kLessEqual, false}},    {"gt", {kGreater, false}},   {"ge", {kGreaterEqual, false}},
      {"lo", {kLess, false}},         {"ls", {kLessEqual, false}}, {"hi", {kGreater, false}},
      {"hs", {kGreaterEqual, false}}, {"equ", {kEqual, true}},     {"neu", {kNotEqual, true}},
      {"ltu", {kLess, true}},         {"leu", {kLessEqual, true}}, {"gtu", {kGreater, true}},
      {"geu", {kGreaterEqual, true}}, {"num", {kNumbers, false}},  {"nan", {kNaN, false}},
  };
  return all;
}

template <Comparison comparison, class T>
inline bool compare(T a, T b) {
  if constexpr (comparison == kEqual) return a == b;
  if constexpr (comparison == kNotEqual) return a != b;
  if constexpr (comparison == kLess) return a < b;
  if constexpr (comparison == kLessEqual) return a <= b;
  if constexpr (comparison == kGreater) return a > b;
  if constexpr (comparison == kGreaterEqual) return a >= b;
  const bool numbers = a == a && b == b;
  return comparison == kNumbers ? numbers : !numbers;
}
// An ordered comparison is false, an unordered one true, where an operand is NaN.
template <Comparison comparison, bool unordered, class T>
inline bool compare_any(T a, T b) {
  if constexpr (!std::is_floating_point_v<T> || comparison >= kNumbers) return compare<comparison>(a, b);
  if constexpr (unordered) return !(a == a) || !(b == b) || compare<comparison>(a, b);
  return (a == a) & (b == b) & compare<comparison>(a, b);
}

// 16-bit numbers are compared as .f32.
template <class T>
inline auto comparable(T value) {
  if constexpr (std::is_same_v<T, half> || std::is_same_v<T, bfloat>)
    return to_f(value);
  else
    return value;
}

// One bit from each of 32 words that are 0 or 1.
inline u32 pack(const u32* words) {
  u32 result = 0;
  for (int k = 0; k < 32; ++k) result |= words[k] << k;
  return result;
}

template <class T, bool flush, Comparison comparison, bool unordered>
u32 compare_lanes(Warp& warp, const Inst& instruction) {
  const T *a = R<T>(warp, instruction.a), *b = R<T>(warp, instruction.b);
  u32 result[32] = {};
  each(warp, result, [=](int lane) {
    auto x = comparable(a[lane]), y = comparable(b[lane]);
    if constexpr (flush) {
      x = ftz(x);
      y = ftz(y);
    }
    return u32(compare_any<comparison, unordered>(x, y));
  });
  return pack(result);
}

enum Flag : u8 { kAnd = 1, kOr = 2, kXor = 3, kBoolean = 3, kNegated = 4, kTwo = 8 };

inline u32 combine(Warp& warp, const Inst& instruction, u32 result) {
  if ((instruction.flag & kBoolean) == 0) return result;
  u32 other = predicate(warp, instruction.c);
  if (instruction.flag & kNegated) other = ~other;
  const u8 boolean = instruction.flag & kBoolean;
  return boolean == kAnd ? result & other : boolean == kOr ? result | other : result ^ other;
}

// setp.CmpOp[.BoolOp] p[|q], a, b[, c]: p = (a CmpOp b) BoolOp c, q = !(a CmpOp b) BoolOp c.
template <class T, bool flush, Comparison comparison, bool unordered>
void set_predicates(Warp& warp, const Inst& instruction) {
  const u32 result = compare_lanes<T, flush, comparison, unordered>(warp, instruction);
  const u32 p = combine(warp, instruction, result), q = combine(warp, instruction, ~result);
  set_predicate(warp, instruction.d, p);
  if (instruction.flag & kTwo) set_predicate(warp, instruction.e, q);
}
// set: all ones, or 1.0 of a floating-point type, where true. 16-bit sources have a result of their type.
template <class T, bool flush, Comparison comparison, bool unordered>
void set_word(Warp& warp, const Inst& instruction) {
  using Word = std::conditional_t<std::is_same_v<T, half> || std::is_same_v<T, bfloat>, u16, u32>;
  const u32 result = combine(warp, instruction, compare_lanes<T, flush, comparison, unordered>(warp, instruction));
  const Word yes = static_cast<Word>(instruction.imm);
  Word* d = R<Word>(warp, instruction.d);
  each(warp, d, [=](int lane) -> Word { return result >> lane & 1 ? yes : 0; });
}

template <class T, bool flush, Comparison comparison, bool unordered>
struct SetPredicates {
  static Handler handler() { return fastest<set_predicates<T, flush, comparison, unordered>>(); }
};
template <class T, bool flush, Comparison comparison, bool unordered>
struct SetWord {
  static Handler handler() { return set_word<T, flush, comparison, unordered>; }
};

template <template <class, bool, Comparison, bool> class Make, class T, bool flush, bool unordered, int k = 0>
Handler of_comparison(Comparison comparison) {
  if constexpr (k < kComparisons) {
    constexpr Comparison kThis = static_cast<Comparison>(k);
    if constexpr (kIsFloating<T> || kThis < kNumbers)
      if (comparison == kThis) return Make<T, flush, kThis, unordered>::handler();
    return of_comparison<Make, T, flush, unordered, k + 1>(comparison);
  }
  return nullptr;
}
template <template <class, bool, Comparison, bool> class Make>
Handler pick(const Variant& variant) {
  const Compare compare = comparisons().at(variant.words[1]);
  const auto floating = [&](auto t, auto flush) -> Handler {
    return compare.unordered ? of_comparison<Make, decltype(t), flush.value, true>(compare.comparison)
                             : of_comparison<Make, decltype(t), flush.value, false>(compare.comparison);
  };
  if (variant.type().kind == Type::kBrain) return floating(bfloat{}, std::false_type{});
  if (variant.type().kind == Type::kFloat) {
    if (variant.type().size == 2) return floating(half{}, std::false_type{});
    if (variant.type().size == 8) return floating(double{}, std::false_type{});
    return variant.has("ftz") ? floating(float{}, std::true_type{}) : floating(float{}, std::false_type{});
  }
  return for_integer(variant.type(), [&](auto t) -> Handler {
    return of_comparison<Make, decltype(t), false, false>(compare.comparison);
  });
}

// The rest of setp and set: operands, and a predicate that the result is combined with.
void comparison_operands(Builder& builder, Inst& instruction, const Variant& variant,
                         const std::vector<Operand>& operands) {
  const size_t first = operands.size() > 1 && operands[1].second ? 2 : 1;
  const std::string& boolean = variant.words[2];
  const bool combined = boolean == "and" || boolean == "or" || boolean == "xor";
  if (operands.size() != first + 2 + combined) die("another number of operands");
  instruction.a = builder.source(operands[first], variant.type());
  instruction.b = builder.source(operands[first + 1], variant.type());
  if (!combined) return;
  instruction.flag |= boolean == "and" ? kAnd : boolean == "or" ? kOr : kXor;
  instruction.c = builder.predicate_source(operands[first + 2]);
  if (operands[first + 2].negated) instruction.flag |= kNegated;
}
void setp_operands(Builder& builder, Inst& instruction, const Variant& variant, const std::vector<Operand>& operands) {
  comparison_operands(builder, instruction, variant, operands);
  instruction.d = builder.predicate_destination(operands[0]);
  if (!operands[1].second) return;
  instruction.e = builder.predicate_destination(operands[1]);
  instruction.flag |= kTwo;
}
void set_operands(Builder& builder, Inst& instruction, const Variant& variant, const std::vector<Operand>& operands) {
  comparison_operands(builder, instruction, variant, operands);
  instruction.d = builder.destination(operands[0], variant.type(1));
  const Type type = variant.type(1);
  instruction.imm = type.kind == Type::kBrain   ? to_bf(1.f).b
                    : type.kind != Type::kFloat ? ~u32(0)
                    : type.size == 2            ? to_half(1.f).b
                                                : bits(1.f);
}

template <class T>
void select(Warp& warp, const Inst& instruction) {
  const u32 chosen = predicate(warp, instruction.c) ^ (instruction.flag ? ~u32(0) : 0);
  T* d = R<T>(warp, instruction.d);
  const T *a = R<T>(warp, instruction.a), *b = R<T>(warp, instruction.b);
  each(warp, d, [=](int lane) { return chosen >> lane & 1 ? a[lane] : b[lane]; });
}
Handler pick_select(const Variant& variant) {
  return for_bits(variant.type(), [](auto t) -> Handler { return fastest<select<decltype(t)>>(); });
}
void select_by(Builder& builder, Inst& instruction, const Variant& variant, const std::vector<Operand>& operands) {
  if (operands.size() != 4) die("another number of operands");
  instruction.d = builder.destination(operands[0], variant.type());
  instruction.a = builder.source(operands[1], variant.type());
  instruction.b = builder.source(operands[2], variant.type());
  instruction.c = builder.predicate_source(operands[3]);
  instruction.flag = operands[3].negated;
}

// slct: a where c is not negative, else b; -0 is not negative, NaN is.
template <class T, class C, bool flush>
void select_by_sign(Warp& warp, const Inst& instruction) {
  T* d = R<T>(warp, instruction.d);
  const T *a = R<T>(warp, instruction.a), *b = R<T>(warp, instruction.b);
  const C* c = R<C>(warp, instruction.c);
  each(warp, d, [=](int lane) {
    if constexpr (flush)
      return ftz(c[lane]) >= 0 ? a[lane] : b[lane];
    else
      return c[lane] >= 0 ? a[lane] : b[lane];
  });
}
Handler pick_select_by_sign(const Variant& variant) {
  return for_bits(variant.type(1), [&](auto t) -> Handler {
    using T = decltype(t);
    if (variant.type().kind == Type::kSigned) return select_by_sign<T, s32, false>;
    return variant.has("ftz") ? select_by_sign<T, float, true> : select_by_sign<T, float, false>;
  });
}
void select_by_sign_operands(Builder& builder, Inst& instruction, const Variant& variant,
                             const std::vector<Operand>& operands) {
  if (operands.size() != 4) die("another number of operands");
  instruction.d = builder.destination(operands[0], variant.type(1));
  instruction.a = builder.source(operands[1], variant.type(1));
  instruction.b = builder.source(operands[2], variant.type(1));
  instruction.c = builder.source(operands[3], variant.type());
}

template <class T, int classes>
void test(Warp& warp, const Inst& instruction) {
  const T* a = R<T>(warp, instruction.a);
  u32 result = 0;
  lanes(warp, [&](int lane) { result |= u32((1 << std::fpclassify(a[lane]) & classes) != 0) << lane; });
  set_predicate(warp, instruction.d, result);
}
template <class T>
Handler test_of(const std::string& what) {
  constexpr int kFinite = 1 << FP_ZERO | 1 << FP_SUBNORMAL | 1 << FP_NORMAL;
  if (what == "finite") return test<T, kFinite>;
  if (what == "infinite") return test<T, 1 << FP_INFINITE>;
  if (what == "number") return test<T, kFinite | 1 << FP_INFINITE>;
  if (what == "notanumber") return test<T, 1 << FP_NAN>;
  return what == "normal" ? test<T, 1 << FP_NORMAL> : test<T, 1 << FP_SUBNORMAL>;
}
Handler pick_test(const Variant& variant) {
  return variant.type().size == 8 ? test_of<double>(variant.words[1]) : test_of<float>(variant.words[1]);
}

enum Logic { kLogicAnd, kLogicOr, kLogicXor, kLogicNot, kLogicMove };
template <Logic logic>
void combine_predicates(Warp& warp, const Inst& instruction) {
  const u32 a = predicate(warp, instruction.a), b = logic < kLogicNot ? predicate(warp, instruction.b) : 0;
  set_predicate(warp, instruction.d,
                logic == kLogicAnd   ? a & b
                : logic == kLogicOr  ? a | b
                : logic == kLogicXor ? a ^ b
                : logic == kLogicNot ? ~a
                                     : a);
}
template <Logic logic>
Handler pick_logic(const Variant&) {
  return combine_predicates<logic>;
}

}  // namespace

const Rules& predicate_rules() {
  static const Rules rules = {
      {"setp{.eq.ne}[.and.or.xor]{.b16.b32.b64}", nullptr, pick<SetPredicates>, setp_operands},
      {"setp{.eq.ne.lt.le.gt.ge}[.and.or.xor]{.s16.s32.s64}", nullptr, pick<SetPredicates>, setp_operands},
      {"setp{.eq.ne.lt.le.gt.ge.lo.ls.hi.hs}[.and.or.xor]{.u16.u32.u64}", nullptr, pick<SetPredicates>, setp_operands},
      {"setp{.eq.ne.lt.le.gt.ge.equ.neu.ltu.leu.gtu.geu.num.nan}[.and.or.xor][.ftz].f32", nullptr, pick<SetPredicates>,
       setp_operands},
      {"setp{.eq.ne.lt.le.gt.ge.equ.neu.ltu.leu.gtu.geu.num.nan}[.and.or.xor].f64", nullptr, pick<SetPredicates>,
       setp_operands},
      {"set{.eq.ne}[.and.or.xor]{.u32.s32.f32}{.b16.b32.b64}", nullptr, pick<SetWord>, set_operands},
      {"set{.eq.ne.lt.le.gt.ge}[.and.or.xor]{.u32.s32.f32}{.s16.s32.s64}", nullptr, pick<SetWord>, set_operands},
      {"set{.eq.ne.lt.le.gt.ge.lo.ls.hi.hs}[.and.or.xor]{.u32.s32.f32}{.u16.u32.u64}", nullptr, pick<SetWord>,
       set_operands},
      {"set{.eq.ne.lt.le.gt.ge.equ.neu.ltu.leu.gtu.geu.num.nan}[.and.or.xor][.ftz]{.u32.s32.f32}.f32", nullptr,
       pick<SetWord>, set_operands},
      {"set{.eq.ne.lt.le.gt.ge.equ.neu.ltu.leu.gtu.geu.num.nan}[.and.or.xor]{.u32.s32.f32}.f64", nullptr, pick<SetWord>,
       set_operands},
      {"set{.eq.ne.lt.le.gt.ge.equ.neu.ltu.leu.gtu.geu.num.nan}[.and.or.xor].f16.f16", nullptr, pick<SetWord>,
       set_operands},
      {"set{.eq.ne.lt.le.gt.ge.equ.neu.ltu.leu.gtu.geu.num.nan}[.and.or.xor].bf16.bf16", nullptr, pick<SetWord>,
       set_operands},
      {"selp{.b16.b32.b64.u16.u32.u64.s16.s32.s64.f32.f64}", nullptr, pick_select, select_by},
      {"slct{.b16.b32.b64.u16.u32.u64.s16.s32.s64.f32.f64}.s32", nullptr, pick_select_by_sign, select_by_sign_operands},
      {"slct[.ftz]{.b16.b32.b64.u16.u32.u64.s16.s32.s64.f32.f64}.f32", nullptr, pick_select_by_sign,
       select_by_sign_operands},
      {"testp{.finite.infinite.number.notanumber.normal.subnormal}{.f32.f64}", "d:pred, a", pick_test},
      {"and.pred", "d, a, b", pick_logic<kLogicAnd>},
      {"or.pred", "d, a, b", pick_logic<kLogicOr>},
      {"xor.pred", "d, a, b", pick_logic<kLogicXor>},
      {"not.pred", "d, a", pick_logic<kLogicNot>},
      {"mov.pred", "d, a", pick_logic<kLogicMove>},
  };
  return rules;
}

}  // namespace soft
