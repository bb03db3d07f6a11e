// What a PTX module declares, while it is being loaded.
#pragma once

#include <array>
#include <map>
#include <string>
#include <vector>

#include "lexer.hpp"
#include "rule.hpp"

namespace soft {

// A variable as its declaration describes it (PTX ISA, "Variables"): .align 8 .b8 name[16].
struct Declaration {
  std::string name;
  Type type;
  u64 bytes = 0;
  u32 align = 1;
  bool open = false;  // name[]: as large as it comes
};

// Reads what follows the state space; stands then before "=", ";", "," or ")".
Declaration read_declaration(Lexer& lexer);

// A .func, to be compiled into its callers.
struct DeviceFunction {
  std::vector<Declaration> results, parameters;
  Lexer body{""};
  bool defined = false;
};

struct Entry {
  std::unique_ptr<Function> function;
  std::vector<Declaration> parameters;
  Lexer body{""};
};

// The .loc directives of a module (PTX ISA, "Debugging Directives").
class Locations {
 public:
  explicit Locations(Module& module) : module_(module) {}
  // Behind the word ".loc"; returns the index in Module::locations.
  u32 read(Lexer& lexer);
  // The names of inlined functions: labels in .debug_str, which stands at the end of the text.
  void read_names(Lexer& section);
  void resolve();

 private:
  Module& module_;
  std::map<std::array<u32, 3>, u32> last_;    // of a place: its latest .loc, which says where that was inlined
  std::map<u32, std::string> labels_;         // of a location
  std::map<std::string, std::string> names_;  // of a label
};

class ModuleLoader {
 public:
  explicit ModuleLoader(const char* text) : lexer_(text), module_(std::make_unique<Module>()), locations_(*module_) {}
  std::unique_ptr<Module> load();
  u32 line() const { return lexer_.line(); }

  // For the body of a function.
  const std::map<std::string, Builder::Symbol>& variables() const { return variables_; }
  // Shared variables of the module; a function has those that it names.
  const std::map<std::string, Declaration>& shared() const { return shared_; }
  const DeviceFunction* device_function(const std::string& name) const;
  Locations& locations() { return locations_; }

 private:
  struct Variable {
    Declaration declaration;
    std::vector<char> data;
    u64 offset;
    bool constant = false;
  };
  struct Reference {  // an initialiser that is an address
    std::string variable, target;
    u64 offset;
    s64 displacement;
  };

  void directive(const Token& token);
  void variable(Space space);
  void initialise(Variable& variable);
  void initial_value(Variable& variable, u64 offset);
  void function(bool is_entry);
  std::vector<Declaration> parameter_list();
  void entry_directives(Function& function);
  void place_variables();

  Lexer lexer_;
  std::unique_ptr<Module> module_;
  Locations locations_;
  std::vector<Variable> pending_;
  std::vector<Reference> references_;
  std::map<std::string, Builder::Symbol> variables_;
  std::map<std::string, Declaration> shared_;
  std::map<std::string, DeviceFunction> device_functions_;
  std::vector<Entry> entries_;
};

// Compiles the body of a kernel; what it calls is compiled into it.
void compile_entry(ModuleLoader& loader, Entry& entry);

}  // namespace soft
