// Conversions between number formats (PTX ISA, "cvt"): rounding to a format or to an integer, saturation, .ftz, .relu,
// packed pairs and .tf32.
#include <cmath>
#include <limits>
#include <type_traits>

#include "../ptx/rule.hpp"
#include "lanes.hpp"

namespace soft {
namespace {

enum Flag : u8 { kFlush = 1, kSaturate = 2, kToInteger = 4, kRelu = 8 };

double round_to_integer(double value, Rounding rounding) {
  switch (rounding) {
    case Rounding::kZero:
      return std::trunc(value);
    case Rounding::kDown:
      return std::floor(value);
    case Rounding::kUp:
      return std::ceil(value);
    default:
      return std::nearbyint(value);
  }
}

template <class T>
double widen(T value) {
  if constexpr (std::is_same_v<T, half> || std::is_same_v<T, bfloat>)
    return to_f(value);
  else
    return value;
}

// From one floating-point format to another, or to an integer in the same one.
template <class To, class From>
To to_number(From from, const Inst& instruction) {
  const Rounding rounding = static_cast<Rounding>(instruction.rnd);
  double value = widen(from);
  if constexpr (std::is_same_v<From, float>)
    if (instruction.flag & kFlush) value = ftz(from);
  if (instruction.flag & kToInteger) value = round_to_integer(value, rounding);
  if (instruction.flag & kSaturate) value = value > 0 ? (value < 1 ? value : 1) : 0;
  if ((instruction.flag & kRelu) && value <= 0) value = 0;
  if constexpr (std::is_same_v<To, double>) {
    return value == value ? value : reinterpret<double>(reinterpret<u64>(value) | u64(1) << 51);  // quiet
  } else if constexpr (std::is_same_v<To, float>) {
    const float result = rounding == Rounding::kNearestEven || (instruction.flag & kToInteger)
                             ? static_cast<float>(value)
                             : round_number<float>(value, rounding);
    return canon(instruction.flag & kFlush ? ftz(result) : result);
  } else {
    return round_number<To>(value, instruction.flag & kToInteger ? Rounding::kNearestEven : rounding);
  }
}

// NaN gives 0, but 2^(bits - 1) from .f64 or to 64 bits. What is too large gives the nearest integer there is.
template <class To, class From>
To to_integer(From from, const Inst& instruction) {
  using Limits = std::numeric_limits<To>;
  double value = widen(from);
  if constexpr (std::is_same_v<From, float>)
    if (instruction.flag & kFlush) value = ftz(from);
  if (value != value) {
    const bool zero = !std::is_same_v<From, double> && sizeof(To) < 8;
    return zero ? 0 : static_cast<To>(u64(1) << (8 * sizeof(To) - 1));
  }
  value = round_to_integer(value, static_cast<Rounding>(instruction.rnd));
  if (value <= static_cast<double>(Limits::min())) return Limits::min();
  if (value >= static_cast<double>(Limits::max())) return Limits::max();
  return static_cast<To>(value);
}

template <class To, class From>
To from_integer(From value, const Inst& instruction) {
  const Rounding rounding = static_cast<Rounding>(instruction.rnd);
  if (instruction.flag & kSaturate) value = value < From(0) ? From(0) : value > From(1) ? From(1) : value;
  if constexpr (std::is_floating_point_v<To>)
    if (rounding == Rounding::kNearestEven) return static_cast<To>(value);
  return round_number<To>(value, rounding);
}

template <class To, class From>
To between_integers(From value, const Inst& instruction) {
  if ((instruction.flag & kSaturate) == 0) return static_cast<To>(value);
  const s128 wide = value, low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
  return static_cast<To>(wide < low ? low : wide > high ? high : wide);
}

template <class To, class From>
To convert(From value, const Inst& instruction) {
  if constexpr (kIsFloating<From>) {
    if constexpr (kIsFloating<To>)
      return to_number<To>(value, instruction);
    else
      return to_integer<To>(value, instruction);
  } else {
    if constexpr (kIsFloating<To>)
      return from_integer<To>(value, instruction);
    else
      return between_integers<To>(value, instruction);
  }
}

// A register may be wider than its type: of the source the lower bits are read, to the destination an integer is
// extended as its sign demands.
template <class To, class From>
void run(Warp& warp, const Inst& instruction) {
  if (instruction.ds == sizeof(To) && instruction.as == sizeof(From)) {
    To* d = R<To>(warp, instruction.d);
    const From* a = R<From>(warp, instruction.a);
    each(warp, d, [&](int lane) { return convert<To>(a[lane], instruction); });
    return;
  }
  lanes(warp, [&](int lane) {
    const u64 all = read_bits(warp, instruction.a, instruction.as, lane);
    From value;
    std::memcpy(&value, &all, sizeof value);
    const To result = convert<To>(value, instruction);
    u64 extended = 0;
    if constexpr (kIsFloating<To>)
      std::memcpy(&extended, &result, sizeof result);
    else
      extended = static_cast<u64>(result);
    write_bits(warp, instruction.d, instruction.ds, lane, extended);
  });
}

template <class Pick>
Handler for_any(Type type, Pick pick) {
  const bool is_signed = type.kind == Type::kSigned;
  if (type.kind == Type::kBrain) return pick(bfloat{});
  if (type.kind == Type::kFloat) return type.size == 2 ? pick(half{}) : type.size == 4 ? pick(float{}) : pick(double{});
  if (type.size == 1) return is_signed ? pick(s8{}) : pick(u8{});
  return for_integer(type, pick);
}
Handler pick(const Variant& variant) {
  return for_any(variant.type(1), [&](auto to) -> Handler {
    return for_any(variant.type(), [&](auto from) -> Handler { return fastest<run<decltype(to), decltype(from)>>(); });
  });
}

void set_modifiers(Inst& instruction, const Variant& variant) {
  instruction.rnd = static_cast<u8>(variant.rounding());
  const bool to_integer = variant.has("rni") || variant.has("rzi") || variant.has("rmi") || variant.has("rpi");
  instruction.flag = (variant.has("ftz") ? kFlush : 0) | (variant.has("sat") ? kSaturate : 0) |
                     (to_integer ? kToInteger : 0) | (variant.has("relu") ? kRelu : 0);
}
void operands_of_any_width(Builder& builder, Inst& instruction, const Variant& variant,
                           const std::vector<Operand>& operands) {
  if (operands.size() != 2) die("another number of operands");
  set_modifiers(instruction, variant);
  Type to = variant.type(1), from = variant.type();
  to.size = instruction.ds = builder.register_size(operands[0], to);
  if (operands[1].kind == Operand::kRegister) from.size = builder.register_size(operands[1], from);
  instruction.as = from.size == 1 ? 2 : from.size;
  instruction.d = builder.destination(operands[0], to);
  instruction.a = builder.source(operands[1], from);
}

// The first source goes to the upper half.
template <class To>
void run_pair(Warp& warp, const Inst& instruction) {
  u32* d = R<u32>(warp, instruction.d);
  const float *a = R<float>(warp, instruction.a), *b = R<float>(warp, instruction.b);
  each(warp, d, [&](int lane) {
    return u32(to_number<To>(a[lane], instruction).b) << 16 | to_number<To>(b[lane], instruction).b;
  });
}
Handler pick_pair(const Variant& variant) {
  return variant.type(1).kind == Type::kBrain ? run_pair<bfloat> : run_pair<half>;
}
void pair_operands(Builder& builder, Inst& instruction, const Variant& variant, const std::vector<Operand>& operands) {
  if (operands.size() != 3) die("another number of operands");
  set_modifiers(instruction, variant);
  instruction.d = builder.destination(operands[0], {Type::kBits, 4});
  instruction.a = builder.source(operands[1], {Type::kFloat, 4});
  instruction.b = builder.source(operands[2], {Type::kFloat, 4});
}

// Both bytes to float16, the low one to the lower half: exact.
void run_e4m3(Warp& warp, const Inst& instruction) {
  u32* d = R<u32>(warp, instruction.d);
  const u16* a = R<u16>(warp, instruction.a);
  each(warp, d, [&](int lane) {
    u32 found = 0;
    for (int i = 0; i < 2; ++i) {
      const u32 byte = a[lane] >> 8 * i & 0xff, exponent = byte >> 3 & 15, mantissa = byte & 7;
      u32 number = (byte & 0x7f) == 0x7f ? 0x7fff : (byte & 0x80) << 8;
      if (number != 0x7fff && exponent > 0) number |= (exponent + 8) << 10 | mantissa << 7;
      if (number != 0x7fff && exponent == 0 && mantissa > 0) {  // m 2^-9
        const u32 top = mantissa > 3 ? 2 : mantissa > 1 ? 1 : 0;
        number |= (top + 6) << 10 | (mantissa << (10 - top) & 0x3ff);
      }
      found |= number << 16 * i;
    }
    return found;
  });
}
Handler pick_e4m3(const Variant&) { return run_e4m3; }
void e4m3_operands(Builder& builder, Inst& instruction, const Variant& variant, const std::vector<Operand>& operands) {
  if (operands.size() != 2) die("another number of operands");
  set_modifiers(instruction, variant);
  instruction.d = builder.destination(operands[0], {Type::kBits, 4});
  instruction.a = builder.source(operands[1], {Type::kBits, 2});
}

// .tf32 is .f32 without its last 13 bits.
void run_tensor(Warp& warp, const Inst& instruction) {
  u32* d = R<u32>(warp, instruction.d);
  const float* a = R<float>(warp, instruction.a);
  const Rounding rounding = static_cast<Rounding>(instruction.rnd);
  each(warp, d, [&](int lane) {
    u32 all = bits(a[lane]);
    if (a[lane] != a[lane]) return Format<float>::kNaN;
    if ((instruction.flag & kRelu) && all >> 31) return u32(0);
    const u32 rest = all & 0x1fff;
    all &= ~u32(0x1fff);
    return rounds_away(rounding, all >> 31, all >> 13 & 1, rest, 0x1000) ? all + 0x2000 : all;
  });
}
Handler pick_tensor(const Variant&) { return run_tensor; }
void tensor_operands(Builder& builder, Inst& instruction, const Variant& variant,
                     const std::vector<Operand>& operands) {
  if (operands.size() != 2) die("another number of operands");
  set_modifiers(instruction, variant);
  instruction.d = builder.destination(operands[0], {Type::kBits, 4});
  instruction.a = builder.source(operands[1], {Type::kFloat, 4});
}

}  // namespace

const Rules& convert_rules() {
  static const Rules rules = {
      {"cvt[.sat]{.u8.u16.u32.u64.s8.s16.s32.s64}{.u8.u16.u32.u64.s8.s16.s32.s64}", nullptr, pick,
       operands_of_any_width},
      {"cvt{.rn.rz.rm.rp}[.ftz][.sat]{.f16.bf16.f32.f64}{.u8.u16.u32.u64.s8.s16.s32.s64}", nullptr, pick,
       operands_of_any_width},
      {"cvt{.rni.rzi.rmi.rpi}[.ftz][.sat]{.u8.u16.u32.u64.s8.s16.s32.s64}{.f16.bf16.f32.f64}", nullptr, pick,
       operands_of_any_width},
      {"cvt[.ftz][.sat].f32{.f16.bf16}", nullptr, pick, operands_of_any_width},
      {"cvt[.ftz][.sat].f64{.f16.bf16.f32}", nullptr, pick, operands_of_any_width},
      {"cvt{.rn.rz.rm.rp}[.ftz][.sat].f32.f64", nullptr, pick, operands_of_any_width},
      {"cvt{.rn.rz.rm.rp}[.ftz][.sat].f16.f32", nullptr, pick, operands_of_any_width},
      {"cvt{.rn.rz.rm.rp}[.sat]{.f16.bf16}.f64", nullptr, pick, operands_of_any_width},
      {"cvt[.rni.rzi.rmi.rpi][.ftz][.sat].f32.f32", nullptr, pick, operands_of_any_width},
      {"cvt[.rni.rzi.rmi.rpi][.sat].f16.f16", nullptr, pick, operands_of_any_width},
      {"cvt[.rni.rzi.rmi.rpi][.sat].f64.f64", nullptr, pick, operands_of_any_width},
      {"cvt{.rn.rz}[.relu]{.f16.bf16}.f32", nullptr, pick, operands_of_any_width},
      {"cvt{.rn.rz}[.relu]{.f16x2.bf16x2}.f32", nullptr, pick_pair, pair_operands},
      {"cvt.rn.f16x2.e4m3x2", nullptr, pick_e4m3, e4m3_operands},
      {"cvt.rna.tf32.f32", nullptr, pick_tensor, tensor_operands},
      {"cvt{.rn.rz}[.relu].tf32.f32", nullptr, pick_tensor, tensor_operands},
  };
  return rules;
}

}  // namespace soft
