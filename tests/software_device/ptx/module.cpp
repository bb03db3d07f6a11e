// Loads a PTX module: the directives outside of functions (PTX ISA, "Directives"), variables with their initial values
// and kernels with their parameters and limits.
#include "module.hpp"

#include <algorithm>

#include <sys/mman.h>

namespace soft {
namespace {

u64 aligned(u64 offset, u64 align) { return (offset + align - 1) / align * align; }

}  // namespace

Declaration read_declaration(Lexer& lexer) {
  Declaration result;
  u64 elements = 1;
  u32 align = 0;
  bool of_pointer = false;  // behind .ptr come the space and the alignment of what a pointer points to
  for (;;) {
    const Token token = lexer.next();
    if (token.kind != Token::kWord) die("a declaration must not have \"" + std::string(token.text) + "\"");
    if (token.is(".align")) {
      const u32 value = static_cast<u32>(lexer.integer());
      if (!of_pointer) align = value;
    } else if (token.is(".ptr")) {
      of_pointer = true;
    } else if (token.is(".v2") || token.is(".v4")) {
      elements *= token.is(".v2") ? 2 : 4;
    } else if (token.is(".attribute")) {
      lexer.skip_past(")");
    } else if (token.text[0] == '.') {
      const Type type = type_of(token.text.substr(1));
      const bool is_space = token.is(".global") || token.is(".const") || token.is(".shared") || token.is(".local");
      if (type.kind != Type::kNone)
        result.type = type;
      else if (!of_pointer || !is_space)
        die("the device has no declaration with " + std::string(token.text));
    } else {
      result.name = std::string(token.text);
      break;
    }
  }
  if (result.type.size == 0) die(result.name + " has no type that the device has");
  result.align = std::max<u32>({align, static_cast<u32>(result.type.size * elements), 1});
  if (align && result.type.size == 1) result.align = align;
  while (lexer.take("[")) {
    if (lexer.take("]")) {
      result.open = true;
      continue;
    }
    elements *= lexer.integer();
    lexer.expect("]");
  }
  result.bytes = result.open ? 0 : elements * result.type.size;
  return result;
}

const DeviceFunction* ModuleLoader::device_function(const std::string& name) const {
  const auto found = device_functions_.find(name);
  return found == device_functions_.end() ? nullptr : &found->second;
}

std::unique_ptr<Module> ModuleLoader::load() {
  for (Token token = lexer_.next(); token.kind != Token::kEnd; token = lexer_.next()) directive(token);
  place_variables();
  for (Entry& entry : entries_) {
    lexer_ = entry.body;  // for the line of an error
    compile_entry(*this, entry);
    const std::string name = entry.function->name;
    module_->functions[name] = std::move(entry.function);
  }
  locations_.resolve();
  return std::move(module_);
}

void ModuleLoader::directive(const Token& token) {
  if (token.is(".target")) {
    module_->target = std::string(lexer_.next().text);
    lexer_.skip_line();
  } else if (token.is(".version") || token.is(".address_size")) {
    lexer_.skip_line();
  } else if (token.is(".weak") || token.is(".visible") || token.is(".extern") || token.is(".common") || token.is(";")) {
    // linkage: there is one module
  } else if (token.is(".global") || token.is(".const")) {
    variable(token.is(".const") ? Const : Global);
  } else if (token.is(".shared")) {
    variable(Shared);
  } else if (token.is(".entry") || token.is(".func")) {
    function(token.is(".entry"));
  } else if (token.is(".file")) {
    const u32 number = static_cast<u32>(lexer_.integer());
    module_->files[static_cast<int>(number)] = std::string(lexer_.next().text);
    lexer_.skip_line();
  } else if (token.is(".section")) {
    const bool names = lexer_.next().is(".debug_str");
    if (names)
      locations_.read_names(lexer_);
    else
      lexer_.skip_block();
  } else if (token.is(".loc")) {
    lexer_.skip_line();
  } else if (token.is(".pragma") || token.is(".alias")) {
    lexer_.skip_past(";");
  } else {
    die("the device has no directive " + std::string(token.text));
  }
}

void ModuleLoader::variable(Space space) {
  Variable result;
  result.constant = space == Const;
  result.declaration = read_declaration(lexer_);
  const std::string name = result.declaration.name;
  if (space == Shared) {
    shared_[name] = result.declaration;
    lexer_.expect(";");
    return;
  }
  result.data.resize(result.declaration.bytes);
  if (lexer_.take("=")) initialise(result);
  lexer_.expect(";");
  pending_.push_back(std::move(result));
}

// A value or a list of them, in braces that may be nested as the dimensions are; what is not given is 0.
void ModuleLoader::initialise(Variable& variable) {
  u64 offset = 0;
  const u64 size = variable.declaration.type.size;
  const auto put = [&] {
    if (variable.declaration.open) variable.data.resize(offset + size);
    if (offset + size > variable.data.size()) die(variable.declaration.name + " has too many initial values");
    initial_value(variable, offset);
    offset += size;
  };
  if (!lexer_.take("{")) {
    put();
    return;
  }
  for (int depth = 1; depth > 0;) {
    if (lexer_.take("}"))
      --depth;
    else if (lexer_.take("{"))
      ++depth;
    else if (!lexer_.take(","))
      put();
  }
}

void ModuleLoader::initial_value(Variable& variable, u64 offset) {
  const Token token = lexer_.peek();
  const u64 size = variable.declaration.type.size;
  if (token.kind == Token::kWord) {  // name, name+4, generic(name): variables have one address in both
    const bool generic = lexer_.take("generic") && lexer_.take("(");
    Reference reference{variable.declaration.name, std::string(lexer_.next().text), offset, 0};
    if (generic) lexer_.expect(")");
    if (lexer_.take("+")) reference.displacement = static_cast<s64>(lexer_.integer());
    if (size != 8) die("an address must be an initial value of 64 bits");
    references_.push_back(reference);
    return;
  }
  const Operand value = lexer_.constant();
  u64 bits_ = value.bits;
  if (value.literal == Operand::kDouble && size == 4) bits_ = bits(static_cast<float>(reinterpret<double>(bits_)));
  std::memcpy(variable.data.data() + offset, &bits_, size);
}

// Every variable is an allocation of its own, with a gap behind it: an access beyond its end is out of bounds.
void ModuleLoader::place_variables() {
  constexpr u64 kGap = 64;
  u64 size = 0;
  for (Variable& variable : pending_) {
    variable.offset = aligned(size, std::max<u64>(variable.declaration.align, 16));
    size = variable.offset + variable.data.size() + kGap;
  }
  if (size == 0) return;
  module_->storage_bytes = aligned(size, 4096);
  void* storage = mmap(nullptr, module_->storage_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (storage == MAP_FAILED) die("no memory for the variables of a module");
  module_->storage = static_cast<char*>(storage);
  const u64 base = reinterpret<u64>(module_->storage) + kOffset;
  const std::lock_guard<std::recursive_mutex> lock(memory().lock);
  for (const Variable& variable : pending_) {
    const u64 address = base + variable.offset;
    std::memcpy(module_->storage + variable.offset, variable.data.data(), variable.data.size());
    if (!variable.data.empty()) {
      Region& region = memory().regions[address] = Region{address, variable.data.size(), kDeviceMemory};
      region.constant = variable.constant;
    }
    module_->globals[variable.declaration.name] = {address, variable.data.size()};
    variables_[variable.declaration.name] = {Global, address};
  }
  for (const Reference& reference : references_) {
    const auto target = variables_.find(reference.target);
    if (target == variables_.end()) die(reference.target + " is no variable of this module");
    const u64 value = target->second.address + static_cast<u64>(reference.displacement);
    std::memcpy(host(variables_.at(reference.variable).address + reference.offset), &value, sizeof value);
  }
}

std::vector<Declaration> ModuleLoader::parameter_list() {
  std::vector<Declaration> result;
  if (!lexer_.take("(")) return result;
  while (!lexer_.take(")")) {
    if (lexer_.take(",")) continue;
    if (lexer_.peek().is(".reg")) die("the device has no functions with parameters in registers");
    lexer_.expect(".param");
    result.push_back(read_declaration(lexer_));
  }
  return result;
}

void ModuleLoader::function(bool is_entry) {
  if (is_entry) {
    Entry entry;
    entry.function = std::make_unique<Function>();
    entry.function->module = module_.get();
    entry.function->name = std::string(lexer_.next().text);
    entry.parameters = parameter_list();
    entry_directives(*entry.function);
    if (lexer_.take(";")) return;  // a declaration
    entry.body = lexer_;
    lexer_.skip_block();
    entries_.push_back(std::move(entry));
    return;
  }
  DeviceFunction function;
  if (lexer_.take(".attribute")) lexer_.skip_past(")");
  function.results = parameter_list();
  const std::string name(lexer_.next().text);
  function.parameters = parameter_list();
  while (lexer_.take(".noreturn")) {
  }
  if (!lexer_.take(";")) {
    function.defined = true;
    function.body = lexer_;
    lexer_.skip_block();
  } else if (device_functions_.count(name)) {
    return;
  }
  device_functions_[name] = function;
}

// Limits of a kernel (PTX ISA, "Performance-Tuning Directives", "Cluster Dimension Directives").
void ModuleLoader::entry_directives(Function& function) {
  Attributes& attributes = function.attributes;
  u64 registers = 0, blocks = 1;  // .maxnreg; of a multiprocessor
  bool blocks_are_clusters = false;
  while (!lexer_.peek().is("{") && !lexer_.peek().is(";")) {
    const Token token = lexer_.next();
    if (token.is(".pragma")) {
      lexer_.skip_past(";");
      continue;
    }
    blocks_are_clusters |= token.is(".blocksareclusters");
    if (token.is(".explicitcluster") || token.is(".blocksareclusters")) continue;
    u32 sizes[3] = {1, 1, 1};
    int count = 0;
    do {
      if (count == 3) die(std::string(token.text) + " of more than three dimensions");
      sizes[count++] = static_cast<u32>(lexer_.integer());
    } while (lexer_.take(","));
    const u64 product = u64{sizes[0]} * sizes[1] * sizes[2];
    if (token.is(".maxntid") || token.is(".reqntid")) {
      attributes.max_threads = static_cast<u32>(std::min<u64>(1024, product));
      attributes.regs_bounded = true;
      if (token.is(".reqntid")) std::copy(sizes, sizes + 3, attributes.block);
    } else if (token.is(".reqnctapercluster")) {
      attributes.cluster = sizes[0];
      if (product != sizes[0]) die("the device has clusters along x only");
    } else if (token.is(".maxnreg")) {
      registers = product;
      attributes.regs_bounded = true;
    } else if (token.is(".minnctapersm")) {
      blocks = std::max<u64>(1, product);
    } else if (!token.is(".maxnctapersm") && !token.is(".maxclusterrank")) {
      die("the device has no directive " + std::string(token.text));
    }
  }
  if (blocks_are_clusters && attributes.cluster != 1) die("the device has no grids that count clusters");
  constexpr u64 kRegisters = 64 << 10, kMost = 255;
  if (registers == 0) registers = std::min(kMost, kRegisters / (attributes.max_threads * blocks) / 8 * 8);
  attributes.regs = static_cast<u32>(registers);
}

Module::~Module() {
  if (!storage) return;
  const std::lock_guard<std::recursive_mutex> lock(memory().lock);
  for (const auto& global : globals) memory().regions.erase(global.second.first);
  munmap(storage, storage_bytes);
}

Module* module_load(const char* text, std::string& error) {
  ModuleLoader loader(text);
  try {
    return loader.load().release();
  } catch (const std::exception& problem) {
    error = "PTX, line " + std::to_string(loader.line()) + ": " + problem.what();
    return nullptr;
  }
}
void module_unload(Module* module) { delete module; }

Function* module_function(Module* module, const char* name) {
  const auto found = module->functions.find(name);
  return found == module->functions.end() ? nullptr : found->second.get();
}

bool module_global(Module* module, const char* name, u64& address, size_t& size) {
  const auto found = module->globals.find(name);
  if (found == module->globals.end()) return false;
  address = found->second.first;
  size = found->second.second;
  return true;
}

const std::vector<Param>& function_params(Function* function) { return function->params; }
Attributes& function_attributes(Function* function) { return function->attributes; }
const std::string& function_name(Function* function) { return function->name; }
const std::string& module_target(Module* module) { return module->target; }

}  // namespace soft
