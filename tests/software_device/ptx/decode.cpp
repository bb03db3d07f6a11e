// Finds the rule of an opcode: the table of all instructions, and how its patterns are read.
#include <algorithm>
#include <mutex>
#include <unordered_map>

#include "rule.hpp"

namespace soft {

Type type_of(std::string_view word) {
  static const std::unordered_map<std::string_view, Type> types = {
      {"pred", {Type::kPredicate, 0}},    {"b8", {Type::kBits, 1}},
      {"b16", {Type::kBits, 2}},          {"b32", {Type::kBits, 4}},
      {"b64", {Type::kBits, 8}},          {"u8", {Type::kUnsigned, 1}},
      {"u16", {Type::kUnsigned, 2}},      {"u32", {Type::kUnsigned, 4}},
      {"u64", {Type::kUnsigned, 8}},      {"s8", {Type::kSigned, 1}},
      {"s16", {Type::kSigned, 2}},        {"s32", {Type::kSigned, 4}},
      {"s64", {Type::kSigned, 8}},        {"f16", {Type::kFloat, 2}},
      {"f32", {Type::kFloat, 4}},         {"f64", {Type::kFloat, 8}},
      {"bf16", {Type::kBrain, 2}},        {"tf32", {Type::kTensor, 4}},
      {"f16x2", {Type::kFloat, 4, true}}, {"bf16x2", {Type::kBrain, 4, true}},
      {"e4m3x2", {Type::kBits, 2}},
  };
  const auto found = types.find(word);
  return found == types.end() ? Type{} : found->second;
}

bool Variant::has(std::string_view word) const {
  for (size_t k = 1; k < words.size(); ++k)
    if (words[k] == word) return true;
  return false;
}

Type Variant::type(int before_last) const {
  for (size_t k = words.size(); k-- > 1;) {
    const Type type = type_of(words[k]);
    if (type.kind != Type::kNone && before_last-- == 0) return type;
  }
  return {};
}

Rounding Variant::rounding() const {
  for (const std::string& word : words) {
    if (word == "rz" || word == "rzi") return Rounding::kZero;
    if (word == "rm" || word == "rmi") return Rounding::kDown;
    if (word == "rp" || word == "rpi") return Rounding::kUp;
    if (word == "rna") return Rounding::kNearestAway;
  }
  return Rounding::kNearestEven;
}

int Variant::vector() const { return has("v2") ? 2 : has("v4") ? 4 : has("v8") ? 8 : 1; }

namespace {

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  for (size_t begin = 0;;) {
    const size_t end = text.find(separator, begin);
    parts.emplace_back(text.substr(begin, end - begin));
    if (end == std::string_view::npos) return parts;
    begin = end + 1;
  }
}

// One place of a pattern: one of these words, or none where it is optional.
struct Place {
  std::vector<std::string> words;
  bool optional;
};

struct Pattern {
  const Rule* rule;
  std::vector<Place> places;
};

Pattern read_pattern(const Rule& rule) {
  Pattern pattern{&rule, {}};
  const std::string_view text = rule.opcode;
  for (size_t k = text.find_first_of(".[{"); k < text.size();) {
    const char bracket = text[k];
    if (bracket == '.') {
      const size_t end = std::min(text.find_first_of(".[{", k + 1), text.size());
      pattern.places.push_back({{std::string(text.substr(k + 1, end - k - 1))}, false});
      k = end;
    } else {
      const size_t end = text.find(bracket == '[' ? ']' : '}', k);
      pattern.places.push_back({split(text.substr(k + 2, end - k - 2), '.'), bracket == '['});
      k = end + 1;
    }
  }
  return pattern;
}

bool matches(const Pattern& pattern, const std::vector<std::string>& words) {
  size_t next = 1;
  for (const Place& place : pattern.places) {
    const bool here =
        next < words.size() && std::find(place.words.begin(), place.words.end(), words[next]) != place.words.end();
    if (here)
      ++next;
    else if (!place.optional)
      return false;
  }
  return next == words.size();
}

// By the name of the opcode.
using Table = std::map<std::string, std::vector<Pattern>>;

const Table& table() {
  static const Table all = [] {
    Table result;
    for (const Rules* rules : {&integer_rules(), &bit_rules(), &carry_rules(), &floating_rules(), &approximate_rules(),
                               &predicate_rules(), &move_rules(), &convert_rules(), &control_rules(), &memory_rules(),
                               &warp_rules(), &matrix_rules(), &async_rules()}) {
      for (const Rule& rule : *rules) {
        const std::string_view opcode = rule.opcode;
        result[std::string(opcode.substr(0, opcode.find_first_of(".[{")))].push_back(read_pattern(rule));
      }
    }
    return result;
  }();
  return all;
}

std::vector<Slot> read_slots(const char* pattern, Type type) {
  std::vector<Slot> slots;
  if (!*pattern) return slots;
  for (std::string text : split(pattern, ',')) {
    text.erase(0, text.find_first_not_of(' '));
    if (text == "imm") {
      slots.push_back({'i', {}});
      continue;
    }
    Slot slot{text[0], type};
    if (text.size() > 2) {
      const std::string width = text.substr(2);
      if (width == "2t")
        slot.type.size *= 2;
      else if (width == "pred")
        slot.type = {Type::kPredicate, 0};
      else
        slot.type = {Type::kBits, static_cast<u8>(std::stoi(width) / 8)};
    }
    slots.push_back(slot);
  }
  return slots;
}

[[noreturn]] void unknown(const std::string& opcode, const std::string& name) {
  const auto rules = table().find(name);
  if (rules == table().end()) die("the device has no instruction " + name);
  std::string message = "the device has no " + opcode + ", only";
  const char* separator = " ";
  for (const Pattern& pattern : rules->second) {
    message += separator + std::string(pattern.rule->opcode);
    separator = ", ";
  }
  die(message);
}

Variant find(const std::string& opcode) {
  Variant variant;
  variant.words = split(opcode, '.');
  const auto rules = table().find(variant.words[0]);
  if (rules != table().end()) {
    for (const Pattern& pattern : rules->second) {
      if (!matches(pattern, variant.words)) continue;
      variant.rule = pattern.rule;
      if (pattern.rule->operands) variant.slots = read_slots(pattern.rule->operands, variant.type());
      if (pattern.rule->handler) {
        variant.handler = pattern.rule->handler(variant);
        if (!variant.handler) unknown(opcode, variant.words[0]);
      }
      return variant;
    }
  }
  unknown(opcode, variant.words[0]);
}

}  // namespace

const Variant& decode_opcode(const std::string& opcode) {
  static std::mutex mutex;
  static std::unordered_map<std::string, Variant> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(opcode);
  return found != known.end() ? found->second : known.emplace(opcode, find(opcode)).first->second;
}

}  // namespace soft
