// Instructions that move the program counter only (PTX ISA, "Control Flow Instructions"): the scheduler of a warp
// executes them by their kind.
#include "execution/handlers.hpp"
#include "ptx/operands.hpp"

namespace soft {
namespace {

void branch(Builder& builder, Inst& instruction, const Variant&, const std::vector<Operand>&) {
  instruction.kind = Bra;
  instruction.target = builder.statement->target;
}
void leave(Builder&, Inst& instruction, const Variant&, const std::vector<Operand>&) { instruction.kind = Exit; }

}  // namespace

const Rules& control_rules() {
  static const Rules rules = {
      {"bra[.uni]", nullptr, nullptr, branch}, {"ret[.uni]", nullptr, nullptr, leave},
      {"exit", nullptr, nullptr, leave},       {"trap", "", always<execute_trap>},
      {"brkpt", "", always<execute_trap>},
  };
  return rules;
}

}  // namespace soft
