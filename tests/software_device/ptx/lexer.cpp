// The words of a PTX text.
#include "lexer.hpp"

#include <cctype>
#include <cstdlib>

namespace soft {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_alphanumeric(char c) { return is_digit(c) || ((c | 32) >= 'a' && (c | 32) <= 'z'); }
bool in_word(char c) { return is_alphanumeric(c) || c == '_' || c == '$' || c == '%' || c == '.'; }

}  // namespace

void Lexer::skip_space() {
  for (;; ++next_) {
    if (*next_ == '\n') {
      ++line_;
    } else if (next_[0] == '/' && next_[1] == '/') {
      while (next_[1] && next_[1] != '\n') ++next_;
    } else if (next_[0] == '/' && next_[1] == '*') {
      for (next_ += 2; *next_ && !(next_[0] == '*' && next_[1] == '/'); ++next_) line_ += *next_ == '\n';
      if (!*next_) return;
      ++next_;
    } else if (*next_ != ' ' && *next_ != '\t' && *next_ != '\r') {
      return;
    }
  }
}

Token Lexer::next() {
  skip_space();
  const char* begin = next_;
  const auto token = [&](Token::Kind kind) {
    return Token{kind, std::string_view(begin, static_cast<size_t>(next_ - begin))};
  };
  if (!*begin) return {};
  if (*begin == '"') {
    for (++next_; *next_ && *next_ != '"';) ++next_;
    const std::string_view text(begin + 1, static_cast<size_t>(next_ - begin - 1));
    if (*next_) ++next_;
    return {Token::kString, text};
  }
  if (is_digit(*begin)) {
    while (is_alphanumeric(*next_) || (*next_ == '.' && is_digit(next_[1])) ||
           ((*next_ == '+' || *next_ == '-') && (next_[-1] == 'e' || next_[-1] == 'E') && begin[1] != 'x'))
      ++next_;
    return token(Token::kNumber);
  }
  if (in_word(*begin)) {
    while (in_word(*next_) || (next_[0] == ':' && next_[1] == ':' && in_word(next_[2]))) next_ += *next_ == ':' ? 2 : 1;
    return token(Token::kWord);
  }
  ++next_;
  return token(Token::kPunctuation);
}

void Lexer::expect(std::string_view text) {
  const Token token = next();
  if (!token.is(text)) die("\"" + std::string(text) + "\" must follow, not \"" + std::string(token.text) + "\"");
}

bool Lexer::take(std::string_view text) {
  Lexer after(*this);
  if (!after.next().is(text)) return false;
  *this = after;
  return true;
}

void Lexer::skip_past(std::string_view text) {
  for (Token token = next(); !token.is(text); token = next())
    if (token.kind == Token::kEnd) die("the text ends before \"" + std::string(text) + "\"");
}

void Lexer::skip_line() {
  while (*next_ && *next_ != '\n') ++next_;
}

void Lexer::skip_block() {
  expect("{");
  for (int depth = 1; depth > 0;) {
    const Token token = next();
    if (token.kind == Token::kEnd) die("the text ends inside { }");
    depth += token.is("{") - token.is("}");
  }
}

Operand Lexer::constant() {
  const bool negative = take("-");
  const Token token = next();
  if (token.kind != Token::kNumber) die("a number must follow, not \"" + std::string(token.text) + "\"");
  const std::string text(token.text);
  Operand result;
  result.kind = Operand::kLiteral;
  const char mark = text.size() > 2 && text[0] == '0' ? static_cast<char>(std::tolower(text[1])) : ' ';
  if ((mark == 'f' && text.size() == 10) || (mark == 'd' && text.size() == 18)) {  // the bits, in hexadecimal
    result.literal = mark == 'f' ? Operand::kSingle : Operand::kDouble;
    result.bits = std::strtoull(text.c_str() + 2, nullptr, 16);
    if (negative) result.bits ^= u64(1) << (mark == 'f' ? 31 : 63);
  } else if (mark != 'x' && text.find_first_of(".eE") != std::string::npos) {
    result.literal = Operand::kDouble;
    result.bits = reinterpret<u64>(std::strtod(text.c_str(), nullptr));
    if (negative) result.bits ^= u64(1) << 63;
  } else {
    const bool binary = mark == 'b';
    char* end = nullptr;
    result.bits = std::strtoull(text.c_str() + (binary ? 2 : 0), &end, binary ? 2 : 0);
    if (*end == 'U') ++end;
    if (*end) die("\"" + text + "\" is not a number");
    if (negative) result.bits = 0 - result.bits;
  }
  return result;
}

u64 Lexer::integer() {
  const Operand operand = constant();
  if (operand.literal != Operand::kInteger) die("an integer must stand here");
  return operand.bits;
}

}  // namespace soft
