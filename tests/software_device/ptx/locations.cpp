// From an instruction to the line of the source, through every call that the compiler inlined: what -lineinfo leaves in
// .file, .loc and .section .debug_str (PTX ISA, "Debugging Directives").
#include <cxxabi.h>

#include <cstdlib>

#include "module.hpp"

namespace soft {
namespace {

std::string demangled(const std::string& name) {
  int status = 0;
  char* readable = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string result = readable ? readable : name;
  std::free(readable);
  return result;
}

}  // namespace

// .loc file line column [, function_name label [+ offset], inlined_at file line column]
u32 Locations::read(Lexer& lexer) {
  const auto place = [&] {
    std::array<u32, 3> numbers;
    for (u32& number : numbers) number = static_cast<u32>(lexer.integer());
    return numbers;
  };
  const std::array<u32, 3> here = place();
  Location location{here[0], here[1], here[2], {}, 0};
  const u32 index = static_cast<u32>(module_.locations.size());
  if (lexer.take(",")) {
    lexer.expect("function_name");
    labels_[index] = std::string(lexer.next().text);
    if (lexer.take("+")) lexer.integer();
    lexer.expect(",");
    lexer.expect("inlined_at");
    const std::array<u32, 3> caller = place();
    const auto found = last_.find(caller);
    location.inlined_at = found == last_.end() ? index + 1 : found->second;
    module_.locations.push_back(location);
    if (found == last_.end()) module_.locations.push_back({caller[0], caller[1], caller[2], {}, 0});  // has no .loc
  } else {
    module_.locations.push_back(location);
  }
  last_[here] = index;
  return index;
}

void Locations::read_names(Lexer& section) {
  section.expect("{");
  for (std::string label; !section.take("}");) {
    const Token token = section.next();
    if (token.kind == Token::kEnd) die("the text ends inside .debug_str");
    if (!token.is(".b8")) {
      label = std::string(token.text);
      section.expect(":");
      continue;
    }
    do {
      const char letter = static_cast<char>(section.integer());
      if (letter) names_[label] += letter;
    } while (section.take(","));
  }
}

void Locations::resolve() {
  for (const auto& [index, label] : labels_) {
    const auto found = names_.find(label);
    if (found != names_.end()) module_.locations[index].function = demangled(found->second);
  }
}

std::string source_line(const Function& function, const Inst& instruction) {
  const Module& module = *function.module;
  std::string result;
  for (u32 index = instruction.location; index != 0;) {
    const Location& location = module.locations[index];
    const auto file = module.files.find(static_cast<int>(location.file));
    const std::string path = file == module.files.end() ? "?" : file->second;
    if (!result.empty()) result += ", inlined at ";
    result += path.substr(path.rfind('/') + 1) + ":" + std::to_string(location.line);
    if (!location.function.empty()) result += " in " + location.function;
    index = location.inlined_at;
  }
  return result;
}

}  // namespace soft
