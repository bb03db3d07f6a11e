// Rules of loads, stores, atomics and fences (PTX ISA, "Data Movement and Conversion Instructions", "Parallel
// Synchronization and Communication Instructions").
#include <algorithm>

#include "execution/grid_order.hpp"
#include "execution/handlers.hpp"
#include "ptx/operands.hpp"

namespace soft {
namespace {

#define SPACES "[.global.shared.shared::cta.shared::cluster.local.param.param::entry.param::func.const]"
#define ORDER "[.weak.relaxed.acquire.release.volatile][.cta.cluster.gpu.sys]"
#define TYPES "{.b8.b16.b32.b64.u8.u16.u32.u64.s8.s16.s32.s64.f32.f64}"
#define HINTS "[.L1::evict_normal.L1::evict_unchanged.L1::evict_first.L1::evict_last.L1::no_allocate]"
#define ATOMIC "[.relaxed.acquire.release.acq_rel][.cta.cluster.gpu.sys][.global.shared.shared::cta.shared::cluster]"

Handler pick_load(const Variant& variant) { return load_handler(variant.words.back()); }
Handler pick_store(const Variant& variant) { return store_handler(variant.words.back()); }

// The registers of a load or a store, all as wide as the widest, and its address.
void access(Builder& builder, Inst& instruction, const Variant& variant, const Operand& registers,
            const Operand& address, bool load) {
  const bool is_vector = registers.kind == Operand::kVector;
  instruction.space = space_of(variant);
  instruction.vec = static_cast<u8>(variant.vector());
  instruction.flag =
      variant.has("relaxed") || variant.has("acquire") || variant.has("release") || variant.has("volatile");
  if (variant.has("nc")) instruction.flag = 2;
  if (is_vector ? registers.parts.size() != instruction.vec : instruction.vec != 1) die("another number of registers");
  Type type = variant.type();
  instruction.ds = 2;
  for (int k = 0; k < instruction.vec; ++k)
    instruction.ds = std::max(instruction.ds, builder.register_size(is_vector ? registers.parts[k] : registers, type));
  type.size = instruction.ds;
  register_list(builder, registers, type, load, instruction.vec, instruction.x);
  builder.address(instruction, address);
}
void load_operands(Builder& builder, Inst& instruction, const Variant& variant, const std::vector<Operand>& operands) {
  count_operands(operands, 2, 2);
  access(builder, instruction, variant, operands[0], operands[1], true);
}
void store_operands(Builder& builder, Inst& instruction, const Variant& variant, const std::vector<Operand>& operands) {
  count_operands(operands, 2, 2);
  access(builder, instruction, variant, operands[1], operands[0], false);
}

// What an atomic or a fence acquires and releases, if it is beyond a block.
u8 grid_order_of(Builder& builder, const Variant& variant, bool both) {
  if (variant.has("cta") || variant.has("cluster")) return 0;
  const bool acquires = both || variant.has("acquire") || variant.has("acq_rel") || variant.has("sc");
  const bool releases = both || variant.has("release") || variant.has("acq_rel") || variant.has("sc");
  builder.function.orders_blocks |= acquires || releases;
  return static_cast<u8>(kOfGrid | acquires * kAcquires | releases * kReleases);
}

const char* atomic_operation(const Variant& variant) {
  for (const char* operation : {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"})
    if (variant.has(operation)) return operation;
  return "";
}
Handler pick_atomic(const Variant& variant) { return atomic_handler(atomic_operation(variant), variant.words.back()); }
void atomic_operands(Builder& builder, Inst& instruction, const Variant& variant,
                     const std::vector<Operand>& operands) {
  const size_t first = variant.words[0] == "atom", compares = variant.has("cas");
  count_operands(operands, 2 + first + compares, 2 + first + compares);
  instruction.space = space_of(variant);
  if (instruction.space != Shared) instruction.flag = grid_order_of(builder, variant, false);
  if (first) {
    instruction.d = builder.destination(operands[0], variant.type());
    instruction.ds = variant.type().size;
  }
  builder.address(instruction, operands[first]);
  instruction.b = builder.source(operands[first + 1], variant.type());
  instruction.c = compares ? builder.source(operands[first + 2], variant.type()) : instruction.b;
}
void fence_operands(Builder& builder, Inst& instruction, const Variant& variant, const std::vector<Operand>& operands) {
  count_operands(operands, 0, 0);
  const bool one_way = variant.has("acquire") || variant.has("release");
  instruction.flag = grid_order_of(builder, variant, !one_way);
}
void map_operand(Builder& builder, Inst& instruction, const Variant&, const std::vector<Operand>& operands) {
  count_operands(operands, 1, 1);
  instruction.b = bare_address(builder, operands[0], kDoubleWord);
}
// A hint: what it names is not looked at.
void any_operands(Builder&, Inst&, const Variant&, const std::vector<Operand>&) {}

}  // namespace

const Rules& memory_rules() {
  static const Rules rules = {
      {"ld" ORDER SPACES "[.ca.cg.cs.lu.cv][.nc]" HINTS "[.L2::64B.L2::128B.L2::256B][.v2.v4.v8]" TYPES, nullptr,
       pick_load, load_operands},
      {"ldu[.global][.v2.v4]" TYPES, nullptr, pick_load, load_operands},
      {"st" ORDER SPACES "[.wb.cg.cs.wt]" HINTS "[.v2.v4.v8]" TYPES, nullptr, pick_store, store_operands},
      {"atom" ATOMIC "{.and.or.xor.exch}{.b32.b64}", nullptr, pick_atomic, atomic_operands},
      {"atom" ATOMIC ".cas{.b16.b32.b64}", nullptr, pick_atomic, atomic_operands},
      {"atom" ATOMIC ".add{.u32.s32.u64.f32.f64}", nullptr, pick_atomic, atomic_operands},
      {"atom" ATOMIC "{.inc.dec}.u32", nullptr, pick_atomic, atomic_operands},
      {"atom" ATOMIC "{.min.max}{.u32.s32.u64.s64}", nullptr, pick_atomic, atomic_operands},
      {"red" ATOMIC "{.and.or.xor}{.b32.b64}", nullptr, pick_atomic, atomic_operands},
      {"red" ATOMIC ".add{.u32.s32.u64.f32.f64}", nullptr, pick_atomic, atomic_operands},
      {"red" ATOMIC "{.inc.dec}.u32", nullptr, pick_atomic, atomic_operands},
      {"red" ATOMIC "{.min.max}{.u32.s32.u64.s64}", nullptr, pick_atomic, atomic_operands},
      {"membar{.cta.gl.sys}", nullptr, always<execute_fence>, fence_operands},
      {"fence[.sc.acq_rel.acquire.release]{.cta.cluster.gpu.sys}", nullptr, always<execute_fence>, fence_operands},
      {"fence.mbarrier_init.release.cluster", "", always<execute_fence_mbarrier_init>},
      {"fence.proxy.async[.shared::cta.shared::cluster]", "", always<execute_fence_proxy_async>},
      {"fence.proxy.async.global", "", always<execute_nothing>},  // races of global memory are not looked for
      {"prefetch.tensormap", nullptr, always<execute_prefetch_tensormap>, map_operand},
      {"prefetch{.param.const}.tensormap", nullptr, always<execute_nothing>, any_operands},
      {"prefetch[.global.local]{.L1.L2}", nullptr, always<execute_nothing>, any_operands},
      {"prefetchu.L1", nullptr, always<execute_nothing>, any_operands},
      {"discard[.global].L2", nullptr, always<execute_nothing>, any_operands},
      {"nanosleep.u32", "a", always<execute_nothing>},
      {"griddepcontrol{.wait.launch_dependents}", "", always<execute_nothing>},
  };
  return rules;
}

}  // namespace soft
