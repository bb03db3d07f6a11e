// Moves between registers, addresses of one space as those of another, and the clock (PTX ISA, "Data Movement and
// Conversion Instructions": mov, cvta, isspacep; "Special Registers").
#include <chrono>

#include "../ptx/rule.hpp"
#include "lanes.hpp"

namespace soft {
namespace {

template <class T>
void move(Warp& warp, const Inst& instruction) {
  unary<T, T>(warp, instruction, [](T a) { return a; });
}
Handler pick_move(const Variant& variant) {
  return for_bits(variant.type(), [](auto t) -> Handler { return fastest<move<decltype(t)>>(); });
}

constexpr u32 kNowhere = ~u32(0);  // an element "_" of a vector

// Inst::vec elements of Inst::size bytes; one of 8 bits lies in a register of 16.
int element(const Inst& instruction) { return instruction.size == 1 ? 2 : instruction.size; }

void pack(Warp& warp, const Inst& instruction) {
  lanes(warp, [&](int lane) {
    u64 value = 0;
    for (int k = 0; k < instruction.vec; ++k) {
      u64 part = read_bits(warp, instruction.x[k], element(instruction), lane);
      if (instruction.size == 1) part &= 255;
      value |= part << (8 * instruction.size * k);
    }
    write_bits(warp, instruction.d, instruction.ds, lane, value);
  });
}
void unpack(Warp& warp, const Inst& instruction) {
  lanes(warp, [&](int lane) {
    const u64 value = read_bits(warp, instruction.a, instruction.ds, lane);
    for (int k = 0; k < instruction.vec; ++k) {
      if (instruction.x[k] == kNowhere) continue;
      u64 part = value >> (8 * instruction.size * k);
      if (instruction.size == 1) part &= 255;
      write_bits(warp, instruction.x[k], element(instruction), lane, part);
    }
  });
}

// %clock and %clock64 count nanoseconds: a clock of 1 GHz.
void read_clock(Warp& warp, const Inst& instruction) {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  const u64 time = std::chrono::duration_cast<std::chrono::nanoseconds>(now).count() >> instruction.imm;
  lanes(warp, [&](int lane) { write_bits(warp, instruction.d, instruction.ds, lane, time); });
}

void move_operands(Builder& builder, Inst& instruction, const Variant& variant, const std::vector<Operand>& operands) {
  if (operands.size() != 2) die("another number of operands");
  const Operand &to = operands[0], &from = operands[1];
  const Type type = variant.type();
  const Operand* vector = to.kind == Operand::kVector ? &to : from.kind == Operand::kVector ? &from : nullptr;
  instruction.ds = type.size;
  if (vector) {
    const size_t count = vector->parts.size();
    if ((count != 2 && count != 4) || type.size % count) die("a vector of " + std::to_string(count) + " elements");
    instruction.vec = static_cast<u8>(count);
    instruction.size = static_cast<u8>(type.size / count);
    const Type part{Type::kBits, instruction.size};
    const bool packs = vector == &from;
    if (packs)
      instruction.d = builder.destination(to, type);
    else
      instruction.a = builder.source(from, type);
    for (size_t k = 0; k < count; ++k) {
      const Operand& operand = vector->parts[k];
      if (packs)
        instruction.x[k] = builder.source(operand, part);
      else
        instruction.x[k] = operand.kind == Operand::kSink ? kNowhere : builder.destination(operand, part);
    }
    instruction.fn = packs ? pack : unpack;
    return;
  }
  instruction.d = builder.destination(to, type);
  if (from.kind == Operand::kSymbol &&
      (from.name == "%clock" || from.name == "%clock64" || from.name == "%clock_hi" || from.name == "%globaltimer")) {
    instruction.imm = from.name == "%clock_hi" ? 32 : 0;
    instruction.fn = read_clock;
    return;
  }
  instruction.a = builder.source(from, type);
}

// Where the generic address space has the window of a space.
u64 window(const std::string& space) {
  if (space.compare(0, 6, "shared") == 0) return kShared;
  if (space == "local") return kLocal;
  return space.compare(0, 5, "param") == 0 ? kParam : 0;
}
void convert_address(Warp& warp, const Inst& instruction) {
  const u64 base = static_cast<u64>(instruction.imm);
  unary<u64, u64>(warp, instruction, [base](u64 a) { return a + base; });
}
Handler pick_convert_address(const Variant&) { return fastest<convert_address>(); }
void set_window(Builder&, Inst& instruction, const Variant& variant, const std::vector<Operand>&) {
  const bool to = variant.words[1] == "to";
  const u64 base = window(variant.words[to ? 2 : 1]);
  instruction.imm = static_cast<s64>(to ? 0 - base : base);
}

// The windows follow each other: global, shared, local, parameters.
void is_in_space(Warp& warp, const Inst& instruction) {
  const u64* a = R<u64>(warp, instruction.a);
  const u64 low = static_cast<u64>(instruction.imm);
  const u64 high = low == 0 ? kShared : low == kParam ? ~u64(0) : 2 * low;
  u32 result = 0;
  lanes(warp, [&](int lane) { result |= u32(a[lane] >= low && a[lane] < high) << lane; });
  set_predicate(warp, instruction.d, result);
}
Handler pick_is_in_space(const Variant&) { return is_in_space; }
void is_in_space_operands(Builder& builder, Inst& instruction, const Variant& variant,
                          const std::vector<Operand>& operands) {
  if (operands.size() != 2) die("another number of operands");
  instruction.d = builder.predicate_destination(operands[0]);
  instruction.a = builder.source(operands[1], {Type::kBits, 8});
  instruction.imm = static_cast<s64>(window(variant.words[1]));
}

}  // namespace

const Rules& move_rules() {
  static const Rules rules = {
      {"mov{.b16.b32.b64.u16.u32.u64.s16.s32.s64.f32.f64}", nullptr, pick_move, move_operands},
      {"cvta{.global.shared.shared::cta.shared::cluster.local.const.param}.u64", "d, a", pick_convert_address,
       set_window},
      {"cvta.to{.global.shared.shared::cta.shared::cluster.local.const.param}.u64", "d, a", pick_convert_address,
       set_window},
      {"isspacep{.global.shared.shared::cta.local.param}", nullptr, pick_is_in_space, is_in_space_operands},
  };
  return rules;
}

}  // namespace soft
