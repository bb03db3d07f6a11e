// What the rules of several files do with operands that a pattern cannot describe.
#pragma once

#include "ptx/rule.hpp"

namespace soft {

constexpr Type kWord{Type::kBits, 4}, kDoubleWord{Type::kBits, 8};

template <Handler handler>
Handler always(const Variant&) {
  return handler;
}

inline void count_operands(const std::vector<Operand>& operands, size_t least, size_t most) {
  if (operands.size() < least || operands.size() > most) die("has " + std::to_string(operands.size()) + " operands");
}

inline Space space_of(const Variant& variant) {
  if (variant.has("global") || variant.has("const")) return Global;
  if (variant.has("shared") || variant.has("shared::cta") || variant.has("shared::cluster")) return Shared;
  if (variant.has("local")) return Local;
  return variant.has("param") || variant.has("param::entry") || variant.has("param::func") ? ParamS : Generic;
}

// `count` registers {...}, or one without braces.
inline void register_list(Builder& builder, const Operand& operand, Type type, bool write, size_t count, u32* offsets) {
  const bool is_vector = operand.kind == Operand::kVector;
  if ((is_vector ? operand.parts.size() : 1) != count) die("another number of registers");
  for (size_t k = 0; k < count; ++k) {
    const Operand& part = is_vector ? operand.parts[k] : operand;
    offsets[k] = write ? builder.destination(part, type) : builder.source(part, type);
  }
}

// The base of an address whose displacement the instruction has no field for.
inline u32 bare_address(Builder& builder, const Operand& operand, Type type) {
  if (operand.kind != Operand::kAddress || operand.displacement) die("takes an address without a displacement");
  return builder.source(operand.parts[0], type);
}

inline s64 constant_operand(const Operand& operand) {
  if (operand.kind != Operand::kLiteral) die("takes a constant");
  return static_cast<s64>(operand.bits);
}

}  // namespace soft
