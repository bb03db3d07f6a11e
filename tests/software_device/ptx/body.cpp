// Reads the body of a kernel: scopes, registers, variables, labels and statements (PTX ISA, "Kernel and Function
// Directives").
#include "body.hpp"

#include <algorithm>

namespace soft {
namespace {

u32 aligned(u32 offset, u32 align) { return (offset + align - 1) / align * align; }

// The text from `begin` to `end` on one line.
std::string on_one_line(const char* begin, const char* end) {
  std::string result;
  for (const char* p = begin; p != end; ++p) {
    const bool space = *p == ' ' || *p == '\t' || *p == '\n' || *p == '\r';
    if (!space)
      result += *p;
    else if (!result.empty() && result.back() != ' ')
      result += ' ';
  }
  return result;
}

}  // namespace

void BodyReader::define_parameters(const std::vector<Declaration>& parameters) {
  u32 offset = 0;
  for (const Declaration& parameter : parameters) {
    const u32 bytes = static_cast<u32>(parameter.bytes);
    offset = aligned(offset, parameter.align);
    function_.params.push_back({offset, bytes, parameter.align});
    builder_.define(parameter.name, {ParamS, offset});
    offset += bytes;
  }
}

std::vector<Statement> BodyReader::read(Lexer body) {
  Frame frame;
  try {
    read_block(body, frame);
    close_scope(frame);
  } catch (const std::exception& error) {
    die(function_.name + ", line " + std::to_string(body.line()) + ": " + error.what());
  }
  Statement last;
  last.opcode = last.text = "exit";
  last.line = body.line();
  last.location = location_;
  statements_.push_back(last);
  return std::move(statements_);
}

void BodyReader::read_block(Lexer& lexer, Frame& frame) {
  lexer.expect("{");
  for (int depth = 1; depth > 0;) {
    const Token token = lexer.next();
    if (token.kind == Token::kEnd) die("the text ends inside " + function_.name);
    if (token.is("{")) {
      ++depth;
      frame.scopes.emplace_back();
    } else if (token.is("}")) {
      if (--depth > 0) {
        close_scope(frame);
        frame.scopes.pop_back();
      }
    } else if (token.is(";") || directive(token, lexer, frame)) {
      continue;
    } else if (token.kind == Token::kWord && lexer.take(":")) {
      Scope& scope = frame.scopes.back();
      const std::string label(token.text);
      if (lexer.take(".branchtargets")) {
        do scope.targets[label].emplace_back(lexer.next().text);
        while (lexer.take(","));
        lexer.expect(";");
      } else {
        scope.labels[label] = static_cast<u32>(statements_.size());
      }
    } else {
      statement(token, lexer, frame);
    }
  }
}

// A label is known in its { } and inside of them.
void BodyReader::close_scope(Frame& frame) {
  const Scope& scope = frame.scopes.back();
  for (const Branch& branch : scope.branches) {
    const auto found = scope.labels.find(branch.label);
    if (found != scope.labels.end()) {
      statements_[branch.statement].target = found->second;
    } else if (frame.scopes.size() > 1) {
      frame.scopes[frame.scopes.size() - 2].branches.push_back(branch);
    } else {
      die("there is no label " + branch.label);
    }
  }
}

bool BodyReader::directive(const Token& token, Lexer& lexer, Frame& frame) {
  if (token.kind != Token::kWord || token.text[0] != '.') return false;
  if (token.is(".reg"))
    registers(lexer, frame);
  else if (token.is(".shared"))
    variable(Shared, lexer, frame);
  else if (token.is(".local"))
    variable(Local, lexer, frame);
  else if (token.is(".param"))
    variable(ParamS, lexer, frame);
  else if (token.is(".loc"))
    location_ = loader_.locations().read(lexer);
  else if (token.is(".pragma"))
    lexer.skip_past(";");
  else
    die("the device has no directive " + std::string(token.text));
  return true;
}

void BodyReader::registers(Lexer& lexer, Frame& frame) {
  const Token word = lexer.next();
  const Type type = type_of(word.text.substr(1));
  if (type.kind == Type::kNone) die("the device has no registers of type " + std::string(word.text));
  const bool predicate = type.kind == Type::kPredicate;
  do {
    const std::string name(lexer.next().text);
    Registers result{0, 1, 0, static_cast<u8>(predicate ? 4 : std::max<u8>(type.size, 2)), predicate};
    const bool numbered = lexer.take("<");
    if (numbered) {
      result.count = static_cast<u32>(lexer.integer());
      lexer.expect(">");
    }
    for (u32 k = 0; k < result.count; ++k) {
      const u32 offset = predicate ? builder_.new_predicate() : builder_.new_register(type.size);
      if (k == 0) result.offset = offset;
      if (k == 1) result.stride = offset - result.offset;
    }
    frame.scopes.back().registers[numbered ? name + "<>" : name] = result;
  } while (lexer.take(","));
  lexer.expect(";");
}

// Shared memory is no better aligned than its declaration says: what needs more has its address misaligned here.
u32 BodyReader::place_shared(const Declaration& declaration) {
  const u32 bytes = static_cast<u32>(declaration.bytes);
  const bool of_cupy = declaration.name.find("_sdata_raw") != std::string::npos;  // doubles in an array of char
  const u32 align = of_cupy ? 16 : declaration.align;
  u32& size = function_.attributes.static_smem;
  size = aligned(size, align) + bytes;
  u32& end = function_.shared_end;
  u32 offset = aligned(end, align);
  if (align < 16 && offset / align % 2 == 0) offset += align;
  function_.shared_arrays.push_back({offset, bytes});
  end = offset + bytes;
  return offset;
}

void BodyReader::variable(Space space, Lexer& lexer, Frame& frame) {
  const Declaration declaration = read_declaration(lexer);
  lexer.expect(";");
  const std::string name = declaration.name + "#" + std::to_string(variables_++);
  frame.scopes.back().variables[declaration.name] = name;
  if (space == Shared) return builder_.define(name, {Shared, place_shared(declaration)});
  u32& used = function_.local_bytes;
  used = aligned(used, declaration.align);
  builder_.define(name, {Local, used});
  used += static_cast<u32>(declaration.bytes);
}

std::string BodyReader::resolve(const std::string& name, const Frame& frame) {
  for (size_t k = frame.scopes.size(); k-- > 0;) {
    const auto found = frame.scopes[k].variables.find(name);
    if (found != frame.scopes[k].variables.end()) return found->second;
  }
  // A kernel has those shared variables of the module that it names.
  const auto shared = loader_.shared().find(name);
  if (shared != loader_.shared().end() && !shared->second.open && !builder_.has(name)) {
    builder_.define(name, {Shared, place_shared(shared->second)});
  }
  return name;
}

bool BodyReader::find_register(const std::string& name, const Frame& frame, Operand& result) const {
  const size_t digits = name.find_last_not_of("0123456789") + 1;
  const std::string numbered = name.substr(0, digits) + "<>";
  const bool has_number = digits < name.size() && name.size() - digits < 9;
  for (size_t k = frame.scopes.size(); k-- > 0;) {
    const auto& known = frame.scopes[k].registers;
    auto found = known.find(name);
    u32 index = 0;
    if (found == known.end() && has_number) {
      found = known.find(numbered);
      index = static_cast<u32>(std::stoul(name.substr(digits)));
    }
    if (found == known.end() || index >= found->second.count) continue;
    result.kind = Operand::kRegister;
    result.offset = found->second.offset + index * found->second.stride;
    result.size = found->second.size;
    result.predicate = found->second.predicate;
    result.name = name;
    return true;
  }
  return false;
}

bool BodyReader::special_register(const std::string& name, Operand& result) {
  for (u32 k = 0; k < kSpecialRegisters.size(); ++k) {
    if (name != kSpecialRegisters[k]) continue;
    if (!function_.special_used[k]) function_.special[k] = builder_.new_register(4);
    function_.special_used[k] = true;
    result.kind = Operand::kRegister;
    result.offset = function_.special[k];
    result.size = 4;
    result.name = name;
    return true;
  }
  return false;
}

Operand BodyReader::named(const std::string& name, Lexer& lexer, Frame& frame) {
  Operand result;
  if (name == "_" || find_register(name, frame, result) || special_register(name, result)) return result;
  result.kind = Operand::kSymbol;
  result.name = resolve(name, frame);
  if (lexer.take("+")) result.displacement = static_cast<s64>(lexer.integer());
  return result;
}

// [base + displacement, further operands]
Operand BodyReader::address(Lexer& lexer, Frame& frame) {
  Operand result;
  result.kind = Operand::kAddress;
  result.parts.push_back(operand(lexer, frame));
  while (!lexer.take("]")) {
    if (lexer.take(",")) {
      result.parts.push_back(operand(lexer, frame));
    } else if (lexer.take("-")) {
      result.displacement -= static_cast<s64>(lexer.integer());
    } else {
      lexer.expect("+");
      result.displacement += static_cast<s64>(lexer.integer());
    }
  }
  return result;
}

Operand BodyReader::operand(Lexer& lexer, Frame& frame) {
  const Token token = lexer.peek();
  if (token.is("-") || token.kind == Token::kNumber) return lexer.constant();
  lexer.next();
  if (token.is("!")) {
    Operand result = operand(lexer, frame);
    result.negated = !result.negated;
    return result;
  }
  if (token.is("[")) return address(lexer, frame);
  if (token.is("{")) {
    Operand result;
    result.kind = Operand::kVector;
    do result.parts.push_back(operand(lexer, frame));
    while (lexer.take(","));
    lexer.expect("}");
    return result;
  }
  if (token.kind != Token::kWord) die("\"" + std::string(token.text) + "\" is no operand");
  return named(std::string(token.text), lexer, frame);
}

void BodyReader::statement(const Token& first, Lexer& lexer, Frame& frame) {
  Statement text;
  Token token = first;
  text.line = lexer.line();
  text.location = location_;
  if (token.is("@")) {
    text.guarded = true;
    text.guard_negated = lexer.take("!");
    Operand guard;
    const std::string name(lexer.next().text);
    if (!find_register(name, frame, guard) || !guard.predicate) die(name + " is not a predicate");
    text.guard = guard.offset;
    token = lexer.next();
  }
  text.opcode = std::string(token.text);
  if (text.opcode == "call" || text.opcode == "call.uni") return call(text, lexer, frame);
  if (frame.is_call && (text.opcode == "ret" || text.opcode == "ret.uni")) {
    lexer.expect(";");
    return return_(text, frame);
  }
  while (!lexer.take(";")) {
    if (!text.operands.empty()) {
      const bool second = lexer.take("|");
      if (!second) lexer.expect(",");
      text.operands.push_back(operand(lexer, frame));
      text.operands.back().second = second;
    } else {
      text.operands.push_back(operand(lexer, frame));
    }
  }
  text.text = on_one_line(first.text.data(), lexer.position());
  if ((text.opcode == "bra" || text.opcode == "bra.uni") && text.operands.size() == 1) {
    const std::string label = text.operands[0].name;
    return branch(std::move(text), label, frame);
  }
  if (text.opcode == "brx.idx" || text.opcode == "brx.idx.uni") return branch_by_index(text, frame);
  statements_.push_back(std::move(text));
}

void BodyReader::branch(Statement text, const std::string& label, Frame& frame) {
  frame.scopes.back().branches.push_back({static_cast<u32>(statements_.size()), label});
  statements_.push_back(std::move(text));
}

}  // namespace soft
