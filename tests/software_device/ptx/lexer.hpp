// The words of a PTX text (PTX ISA, "Syntax").
#pragma once

#include <string>
#include <string_view>

#include "rule.hpp"

namespace soft {

struct Token {
  enum Kind : u8 { kWord, kNumber, kPunctuation, kString, kEnd };
  Kind kind = kEnd;
  std::string_view text;  // in the PTX; of a string, what is between the quotes

  bool is(std::string_view other) const { return kind != kString && text == other; }
};

// Copying a lexer keeps the place in the text.
class Lexer {
 public:
  explicit Lexer(const char* text) : next_(text) {}

  // A word may begin with a dot and have dots inside: "ld.shared::cta.u32", "%tid.x", ".reg".
  Token next();
  Token peek() const { return Lexer(*this).next(); }
  // Takes the next token, which must be this one.
  void expect(std::string_view text);
  // Takes the next token if it is this one.
  bool take(std::string_view text);
  void skip_past(std::string_view text);
  void skip_line();
  // Behind the "}" that closes the "{" that comes next.
  void skip_block();

  // The next token as a constant: a sign, and a number as PTX writes it.
  Operand constant();
  u64 integer();

  u32 line() const { return line_; }
  const char* position() const { return next_; }

 private:
  void skip_space();

  const char* next_;
  u32 line_ = 1;
};

}  // namespace soft
