// Registers, constants and addresses of a function: offsets in the register file of a warp, in which a register is 32
// values side by side and a constant is a register that nobody writes.
#include "rule.hpp"

namespace soft {
namespace {

std::string describe(const Operand& operand) {
  if (!operand.name.empty()) return operand.name;
  return operand.kind == Operand::kLiteral ? std::to_string(operand.bits) : "an operand of this kind";
}

// Registers of 8 bits are kept in 16.
int stored(int size) { return size == 1 ? 2 : size; }

u64 literal(const Operand& operand, Type type) {
  if (type.kind == Type::kFloat && operand.literal == Operand::kSingle && type.size == 8)
    return reinterpret<u64>(static_cast<double>(f32(static_cast<u32>(operand.bits))));
  if (operand.literal == Operand::kDouble && type.size == 4) {
    if (type.kind != Type::kFloat) die("a literal of 64 bits where the instruction takes 32");
    return bits(static_cast<float>(reinterpret<double>(operand.bits)));
  }
  return operand.bits;
}

}  // namespace

u32 Builder::allocate(u32 bytes) {
  next_ = (next_ + 31) & ~31u;
  const u32 offset = next_;
  next_ += bytes;
  if (among_constants_) function.constants.resize(next_ - function.const_begin);
  return offset;
}
u32 Builder::new_register(int size) { return allocate(32 * stored(size)); }
u32 Builder::new_predicate() { return allocate(sizeof(u32)); }

void Builder::begin_constants() {
  function.const_begin = next_ = (next_ + 31) & ~31u;
  among_constants_ = true;
}
void Builder::finish() {
  function.constants.resize((function.constants.size() + 31) & ~size_t(31));
  function.regs_bytes = function.const_begin + static_cast<u32>(function.constants.size());
}

u32 Builder::constant(u64 value, int size) {
  size = stored(size);
  if (size < 8) value &= (u64(1) << (8 * size)) - 1;
  const auto [entry, is_new] = constants_.insert({{value, size}, 0});
  if (is_new) {
    entry->second = new_register(size);
    char* lanes = function.constants.data() + (entry->second - function.const_begin);
    for (int lane = 0; lane < 32; ++lane) std::memcpy(lanes + lane * size, &value, size);
  }
  return entry->second;
}

u32 Builder::carry() {
  if (!has_carry_) carry_ = new_predicate();
  has_carry_ = true;
  return carry_;
}

Builder::Symbol Builder::symbol(const std::string& name) const {
  const auto found = symbols_.find(name);
  if (found == symbols_.end()) die(name + " is no variable or register that the device has");
  return found->second;
}

u32 Builder::source(const Operand& operand, Type type) {
  if (type.kind == Type::kPredicate) return predicate_source(operand);
  switch (operand.kind) {
    case Operand::kRegister:
      if (operand.predicate || operand.size != stored(type.size))
        die(operand.name + " is not a register of " + std::to_string(8 * type.size) + " bits");
      return operand.offset;
    case Operand::kLiteral:
      return constant(literal(operand, type), type.size);
    case Operand::kSymbol:
      return constant(symbol(operand.name).address + operand.displacement, type.size);
    default:
      die(describe(operand) + " cannot be read");
  }
}

u32 Builder::destination(const Operand& operand, Type type) {
  if (type.kind == Type::kPredicate) return predicate_destination(operand);
  if (operand.kind == Operand::kSink) {
    const auto [entry, is_new] = sinks_.insert({stored(type.size), 0});
    if (is_new) entry->second = new_register(type.size);
    return entry->second;
  }
  if (operand.kind != Operand::kRegister) die(describe(operand) + " cannot be written");
  return source(operand, type);
}

u32 Builder::predicate_source(const Operand& operand) {
  if (operand.kind == Operand::kLiteral) return constant(operand.bits ? ~u32(0) : 0, 4);
  if (operand.kind != Operand::kRegister || !operand.predicate) die(describe(operand) + " is not a predicate");
  return operand.offset;
}

u32 Builder::predicate_destination(const Operand& operand) {
  if (operand.kind == Operand::kSink) return destination(operand, {Type::kBits, 4});
  if (operand.kind != Operand::kRegister) die(describe(operand) + " cannot be written");
  return predicate_source(operand);
}

u8 Builder::register_size(const Operand& operand, Type type) const {
  if (operand.kind != Operand::kRegister) return static_cast<u8>(stored(type.size));
  if (operand.predicate || operand.size < type.size)
    die(operand.name + " has fewer than " + std::to_string(8 * type.size) + " bits");
  return operand.size;
}

void Builder::address(Inst& instruction, const Operand& operand) {
  if (operand.kind != Operand::kAddress) die(describe(operand) + " is not an address");
  const Operand& base = operand.parts[0];
  instruction.imm = operand.displacement;
  instruction.as = 0;
  if (base.kind == Operand::kRegister) {
    if (base.predicate || base.size < 4) die(base.name + " is not an address");
    instruction.a = base.offset;
    instruction.as = base.size;
  } else if (base.kind == Operand::kSymbol) {
    const Symbol symbol_ = symbol(base.name);
    instruction.imm += static_cast<s64>(symbol_.address) + base.displacement;
    if (instruction.space == ParamS) instruction.space = symbol_.space;  // .param of a call lies in local memory
    if (instruction.space == Generic) {
      const u64 window = symbol_.space == Shared   ? kShared
                         : symbol_.space == Local  ? kLocal
                         : symbol_.space == ParamS ? kParam
                                                   : 0;
      instruction.imm += static_cast<s64>(window);
    }
  } else {
    instruction.imm += static_cast<s64>(base.bits);
  }
}

void Builder::fill(Inst& instruction, const std::vector<Slot>& slots, const std::vector<Operand>& operands) {
  if (operands.size() != slots.size())
    die("takes " + std::to_string(slots.size()) + " operands, but has " + std::to_string(operands.size()));
  for (size_t k = 0; k < slots.size(); ++k) {
    const Slot slot = slots[k];
    const Operand& operand = operands[k];
    if (operand.negated) die("! stands where no predicate is read");
    switch (slot.field) {
      case 'd':
        instruction.d = destination(operand, slot.type);
        break;
      case 'a':
        instruction.a = source(operand, slot.type);
        break;
      case 'b':
        instruction.b = source(operand, slot.type);
        break;
      case 'c':
        instruction.c = source(operand, slot.type);
        break;
      case 'e':
        instruction.e = source(operand, slot.type);
        break;
      default:
        if (operand.kind != Operand::kLiteral) die(describe(operand) + " is not a constant");
        instruction.imm = static_cast<s64>(operand.bits);
    }
  }
}

Inst Builder::decode(const Statement& text) {
  Inst instruction;
  instruction.has_pred = text.guarded;
  instruction.pneg = text.guard_negated;
  instruction.pred = text.guard;
  instruction.location = text.location;
  const u32 source_line = function.module->locations[text.location].line;
  instruction.line = source_line ? source_line : text.line;
  instruction.text = static_cast<u32>(function.texts.size());
  function.texts.push_back(text.text);
  statement = &text;
  try {
    const Variant& variant = decode_opcode(text.opcode);
    instruction.fn = variant.handler;
    if (variant.rule->operands) fill(instruction, variant.slots, text.operands);
    if (variant.rule->build) variant.rule->build(*this, instruction, variant, text.operands);
  } catch (const std::exception& error) {
    // The module loads, as on a GPU; launching this kernel is the error.
    instruction.fn = nullptr;
    if (function.error.empty())
      function.error = "line " + std::to_string(text.line) + ": " + text.text + ": " + error.what();
  }
  return instruction;
}

}  // namespace soft
