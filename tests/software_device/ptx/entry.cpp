// Compiles a kernel: reads its body, places its shared memory, decodes its statements.
#include <algorithm>

#include "body.hpp"

namespace soft {

void compile_entry(ModuleLoader& loader, Entry& entry) {
  Function& function = *entry.function;
  Builder builder(function);
  for (const auto& variable : loader.variables()) builder.define(variable.first, variable.second);
  function.attributes.static_smem = 0;
  BodyReader reader(loader, function, builder);
  reader.define_parameters(entry.parameters);
  const std::vector<Statement> statements = reader.read(entry.body);

  // Dynamic shared memory lies behind the static one, as aligned as it is declared and no more: a kernel that needs
  // more, for a swizzle of TMA or wgmma, must say so.
  constexpr u32 kLeast = 16;
  u32 alignment = kLeast;
  for (const auto& shared : loader.shared())
    if (shared.second.open) alignment = std::max(alignment, shared.second.align);
  u32 multiple = (static_end(function) + alignment - 1) / alignment;
  multiple += multiple % 2 == 0;
  function.dynamic_begin = multiple * alignment;
  for (const auto& shared : loader.shared())
    if (shared.second.open) builder.define(shared.first, {Shared, function.dynamic_begin});

  builder.begin_constants();
  function.code.reserve(statements.size());
  for (const Statement& statement : statements) function.code.push_back(builder.decode(statement));
  builder.finish();
  function.attributes.local = function.local_bytes;
  function.attributes.num_instructions = static_cast<u32>(function.code.size());
}

}  // namespace soft
