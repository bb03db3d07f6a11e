// The statements of a kernel, with everything that it calls.
#pragma once

#include <unordered_map>

#include "module.hpp"

namespace soft {

// Reads a body into statements: gives every register its offset and every label its index. A call becomes the
// statements of the function that it calls, its parameters variables in local memory.
class BodyReader {
 public:
  BodyReader(ModuleLoader& loader, Function& function, Builder& builder)
      : loader_(loader), function_(function), builder_(builder) {}

  void define_parameters(const std::vector<Declaration>& parameters);
  std::vector<Statement> read(Lexer body);

 private:
  struct Registers {  // %r<5>: one name and a number
    u32 offset, count, stride;
    u8 size;
    bool predicate;
  };
  struct Branch {
    u32 statement;
    std::string label;
  };
  struct Scope {
    std::unordered_map<std::string, Registers> registers;
    std::unordered_map<std::string, std::string> variables;  // to the name that the builder knows
    std::unordered_map<std::string, u32> labels;
    std::unordered_map<std::string, std::vector<std::string>> targets;  // of .branchtargets, by their label
    std::vector<Branch> branches;                                       // to labels that are not known yet
  };
  // The scopes of one body; of a function that is called, how it returns.
  struct Frame {
    std::vector<Scope> scopes{1};
    std::vector<u32> returns;
    bool is_call = false;
  };

  void read_block(Lexer& lexer, Frame& frame);
  void close_scope(Frame& frame);
  bool directive(const Token& token, Lexer& lexer, Frame& frame);
  void registers(Lexer& lexer, Frame& frame);
  void variable(Space space, Lexer& lexer, Frame& frame);
  u32 place_shared(const Declaration& declaration);
  void statement(const Token& first, Lexer& lexer, Frame& frame);
  void branch(Statement text, const std::string& label, Frame& frame);
  void branch_by_index(const Statement& text, Frame& frame);
  void call(const Statement& text, Lexer& lexer, Frame& frame);
  void return_(Statement& text, Frame& frame);
  std::string argument(Lexer& lexer, Frame& frame);

  Operand operand(Lexer& lexer, Frame& frame);
  Operand address(Lexer& lexer, Frame& frame);
  Operand named(const std::string& name, Lexer& lexer, Frame& frame);
  bool find_register(const std::string& name, const Frame& frame, Operand& result) const;
  bool special_register(const std::string& name, Operand& result);
  // The builder's name of a variable.
  std::string resolve(const std::string& name, const Frame& frame);

  ModuleLoader& loader_;
  Function& function_;
  Builder& builder_;
  std::vector<Statement> statements_;
  std::vector<std::string> calling_;
  u32 location_ = 0;
  u32 variables_ = 0;
};

}  // namespace soft
