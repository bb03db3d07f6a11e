// A row of the decoder's table: how an instruction is written, and what executes it.
//
// An opcode is written as in the PTX ISA, word for word in its order: ".rn" must stand there, "{.u16.u32}" is exactly
// one of these, "[.rz.rm]" one of these or nothing. What no row describes is an error: a modifier is never ignored.
//
// Operands: a list such as "d:2t, a, b, c:32", each the field of Inst that takes the offset of the register (or of the
// constant) and its type: "t" is the instruction's, and the default; "2t" twice as wide; "32" and "64" so many bits;
// "pred". "imm" is an integer for Inst::imm.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "../instruction.hpp"

namespace soft {

struct Type {
  enum Kind : u8 { kNone, kBits, kUnsigned, kSigned, kFloat, kBrain, kTensor, kPredicate };
  Kind kind = kNone;
  u8 size = 0;        // in bytes; a predicate has none
  bool pair = false;  // .f16x2, .bf16x2

  bool operator==(const Type& other) const { return kind == other.kind && size == other.size && pair == other.pair; }
};

// The type that a word names ("u32", without its dot), else kNone.
Type type_of(std::string_view word);

// An operand as it is written.
struct Operand {
  enum Kind : u8 { kRegister, kLiteral, kSymbol, kVector, kAddress, kSink };
  enum Literal : u8 { kInteger, kSingle, kDouble };
  Kind kind = kSink;
  Literal literal = kInteger;
  bool negated = false;    // !%p1
  bool second = false;     // stands behind "|"
  bool predicate = false;  // a register of type .pred
  u8 size = 0;             // of a register, in bytes
  u32 offset = 0;          // of a register
  u64 bits = 0;            // of a literal
  s64 displacement = 0;    // [%r1+16], name+4
  std::string name;
  std::vector<Operand> parts;  // of a vector; of an address: base and what follows behind commas
};

// One instruction as it is written.
struct Statement {
  std::string opcode;
  std::vector<Operand> operands;
  bool guarded = false, guard_negated = false;  // @!%p1
  u32 guard = 0;                                // offset of that predicate
  u32 line = 0;                                 // in the PTX
  u32 location = 0;                             // in the source
  u32 target = 0;                               // of a branch: index of a statement
  std::string text;                             // for error texts
};

struct Rule;

// One operand of a rule: the field of Inst that it goes to ('i' is imm), and the type it is read as.
struct Slot {
  char field;
  Type type;
};

// The opcode of one instruction, as its rule describes it.
struct Variant {
  const Rule* rule = nullptr;
  std::vector<std::string> words;  // without dots; the first is the opcode's name
  std::vector<Slot> slots;
  Handler handler = nullptr;

  bool has(std::string_view word) const;
  // The type at the end, or `before_last` types before it.
  Type type(int before_last = 0) const;
  Rounding rounding() const;
  // 1, 2, 4 or 8: .v2, .v4, .v8.
  int vector() const;
};

class Builder;

struct Rule {
  const char* opcode;
  const char* operands;
  Handler (*handler)(const Variant&);
  // What the pattern of operands cannot say; called after it.
  void (*build)(Builder&, Inst&, const Variant&, const std::vector<Operand>&) = nullptr;
};

using Rules = std::vector<Rule>;

// Finds the rule of an opcode; throws where there is none, and says which there are for that name.
const Variant& decode_opcode(const std::string& opcode);

// The table, one part a file.
const Rules& integer_rules();
const Rules& bit_rules();
const Rules& carry_rules();
const Rules& floating_rules();
const Rules& approximate_rules();
const Rules& predicate_rules();
const Rules& move_rules();
const Rules& convert_rules();
const Rules& control_rules();
const Rules& memory_rules();
const Rules& warp_rules();
const Rules& matrix_rules();
const Rules& async_rules();

// Turns the statements of one function into instructions: gives registers and constants their offsets.
class Builder {
 public:
  explicit Builder(Function& function) : function(function) {}

  // Offset of a register read as this type, or of a constant with this value.
  u32 source(const Operand& operand, Type type);
  u32 destination(const Operand& operand, Type type);
  u32 predicate_source(const Operand& operand);
  u32 predicate_destination(const Operand& operand);
  // For ld, st and cvt, whose registers may be wider than the type: the size of the register.
  u8 register_size(const Operand& operand, Type type) const;
  // Sets a, as and imm to the address.
  void address(Inst& instruction, const Operand& operand);
  // Every lane sees `value` there.
  u32 constant(u64 value, int size);
  // The predicate in which add.cc and its kind leave their carry.
  u32 carry();
  // New registers, for what the text does not name.
  u32 new_register(int size);
  u32 new_predicate();

  struct Symbol {
    Space space;
    u64 address;
  };
  Symbol symbol(const std::string& name) const;
  bool has(const std::string& name) const { return symbols_.count(name) > 0; }
  void define(const std::string& name, Symbol symbol) { symbols_[name] = symbol; }

  // The statement that is being decoded.
  const Statement* statement = nullptr;
  Function& function;

  Inst decode(const Statement& statement);
  // From here on registers lie among the constants.
  void begin_constants();
  void finish();

 private:
  void fill(Inst& instruction, const std::vector<Slot>& slots, const std::vector<Operand>& operands);
  u32 allocate(u32 bytes);

  std::map<std::string, Symbol> symbols_;
  std::map<std::pair<u64, int>, u32> constants_;
  std::map<int, u32> sinks_;
  u32 next_ = 0, carry_ = 0;
  bool among_constants_ = false, has_carry_ = false;
};

// The handler of a template for the type of a variant: pick(T{}) returns it.
template <class Pick>
Handler for_integer(Type type, Pick pick) {
  const bool is_signed = type.kind == Type::kSigned;
  switch (type.size) {
    case 2:
      return is_signed ? pick(s16{}) : pick(u16{});
    case 4:
      return is_signed ? pick(s32{}) : pick(u32{});
    default:
      return is_signed ? pick(s64{}) : pick(u64{});
  }
}

template <class Pick>
Handler for_bits(Type type, Pick pick) {
  return type.size == 2 ? pick(u16{}) : type.size == 4 ? pick(u32{}) : pick(u64{});
}

}  // namespace soft
