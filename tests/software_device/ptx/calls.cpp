// Statements that become several: calls, returns from them, and branches by an index (PTX ISA, "Control Flow
// Instructions": call, ret, brx.idx).
#include <algorithm>

#include "body.hpp"

namespace soft {

// brx.idx: a comparison and a branch for each of its targets; an index beyond them is undefined, and an error here.
void BodyReader::branch_by_index(const Statement& text, Frame& frame) {
  if (text.operands.size() != 2) die("brx.idx takes an index and the label of its targets");
  const std::string& label = text.operands[1].name;
  const std::vector<std::string>* targets = nullptr;
  for (size_t k = frame.scopes.size(); k-- > 0 && !targets;) {
    const auto found = frame.scopes[k].targets.find(label);
    if (found != frame.scopes[k].targets.end()) targets = &found->second;
  }
  if (!targets) die("there are no .branchtargets " + label);
  Operand taken, guard, index;
  taken.kind = guard.kind = Operand::kRegister;
  taken.predicate = guard.predicate = true;
  taken.offset = builder_.new_predicate();
  guard.offset = text.guard;
  guard.negated = text.guard_negated;
  index.kind = Operand::kLiteral;
  for (index.bits = 0; index.bits < targets->size(); ++index.bits) {
    Statement compare = text;
    compare.guarded = false;
    compare.opcode = text.guarded ? "setp.eq.and.u32" : "setp.eq.u32";
    compare.operands = {taken, text.operands[0], index};
    if (text.guarded) compare.operands.push_back(guard);
    statements_.push_back(compare);
    Statement jump = text;
    jump.opcode = "bra";
    jump.guarded = true;
    jump.guard_negated = false;
    jump.guard = taken.offset;
    branch(jump, (*targets)[index.bits], frame);
  }
  Statement beyond = text;
  beyond.opcode = "trap";
  beyond.operands.clear();
  statements_.push_back(beyond);
}

// A function that returns under a predicate goes on with its other lanes.
void BodyReader::return_(Statement& text, Frame& frame) {
  frame.returns.push_back(static_cast<u32>(statements_.size()));
  text.text = text.opcode;
  text.opcode = "bra";
  statements_.push_back(text);
}

std::string BodyReader::argument(Lexer& lexer, Frame& frame) {
  const Operand result = operand(lexer, frame);
  if (result.kind != Operand::kSymbol) die("an argument of a call must be a .param variable");
  return result.name;
}

// call (results), name, (arguments): the body of the function, with its parameters named as the arguments are.
void BodyReader::call(const Statement& text, Lexer& lexer, Frame& frame) {
  std::vector<std::string> results, arguments;
  const auto list = [&](std::vector<std::string>& names) {
    while (!lexer.take(")"))
      if (!lexer.take(",")) names.push_back(argument(lexer, frame));
  };
  if (lexer.take("(")) {
    list(results);
    lexer.expect(",");
  }
  const std::string name(lexer.next().text);
  if (lexer.take(",") && lexer.take("(")) list(arguments);
  lexer.skip_past(";");

  const DeviceFunction* function = loader_.device_function(name);
  if (!function || !function->defined) {
    function_.error = "line " + std::to_string(text.line) + ": calls " + name + ", which the device does not have";
    return;
  }
  if (std::find(calling_.begin(), calling_.end(), name) != calling_.end()) die(name + " calls itself");
  if (results.size() != function->results.size() || arguments.size() != function->parameters.size())
    die("a call of " + name + " with another number of parameters");

  Frame callee;
  callee.is_call = true;
  for (size_t k = 0; k < results.size(); ++k) callee.scopes[0].variables[function->results[k].name] = results[k];
  for (size_t k = 0; k < arguments.size(); ++k) callee.scopes[0].variables[function->parameters[k].name] = arguments[k];
  if (text.guarded) {  // @p call: without p, over it
    Statement over = text;
    over.guard_negated = !over.guard_negated;
    over.opcode = "bra";
    over.text = "call " + name;
    callee.returns.push_back(static_cast<u32>(statements_.size()));
    statements_.push_back(over);
  }
  const u32 location = location_;
  calling_.push_back(name);
  Lexer body = function->body;
  read_block(body, callee);
  close_scope(callee);
  calling_.pop_back();
  location_ = location;
  for (const u32 statement : callee.returns) statements_[statement].target = static_cast<u32>(statements_.size());
}

}  // namespace soft
