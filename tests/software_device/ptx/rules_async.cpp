// Rules of asynchronous copies and mbarriers (PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy",
// "mbarrier").
#include "execution/handlers.hpp"
#include "ptx/operands.hpp"

namespace soft {
namespace {

using Operands = std::vector<Operand>;

// [shared], [global + source_imm], bytes[, bytes to read]
void cp_async_operands(Builder& builder, Inst& instruction, const Variant& variant, const Operands& operands) {
  count_operands(operands, 3, 4);
  instruction.space = Shared;
  builder.address(instruction, operands[0]);
  if (operands[1].kind != Operand::kAddress) die("takes an address in global memory");
  instruction.b = builder.source(operands[1].parts[0], kDoubleWord);
  instruction.source_imm = operands[1].displacement;
  const s64 bytes = constant_operand(operands[2]);
  if (bytes != 16 && (variant.has("cg") || (bytes != 4 && bytes != 8))) die("copies another number of bytes");
  instruction.size = static_cast<u8>(bytes);
  instruction.flag = operands.size() > 3;
  if (instruction.flag) instruction.c = builder.source(operands[3], kWord);
}
void wait_all(Builder&, Inst& instruction, const Variant&, const Operands&) { instruction.imm = -1; }

Handler pick_mbarrier(const Variant& variant) {
  const std::string& what = variant.words[1];
  if (what == "init") return execute_mbarrier_init;
  if (what == "inval") return execute_mbarrier_inval;
  if (what == "expect_tx") return execute_mbarrier_expect;
  return what == "arrive" ? execute_mbarrier_arrive : execute_mbarrier_wait;
}
// [mbarrier], number
void mbarrier_operands(Builder& builder, Inst& instruction, const Variant& variant, const Operands& operands) {
  const bool number = variant.words[1] != "inval";
  count_operands(operands, 1 + number, 1 + number);
  instruction.space = Shared;
  builder.address(instruction, operands[0]);
  if (number) instruction.b = builder.source(operands[1], kWord);
}
Order order_of(const Variant& variant) {
  return variant.has("relaxed") ? Order::kRelaxed : variant.has("cluster") ? Order::kCluster : Order::kBlock;
}
// _, [mbarrier][, bytes]
void arrive_operands(Builder& builder, Inst& instruction, const Variant& variant, const Operands& operands) {
  instruction.flag = variant.has("expect_tx");
  instruction.order = order_of(variant);
  count_operands(operands, 2 + instruction.flag, 2 + instruction.flag);
  instruction.space = Shared;
  if (operands[0].kind != Operand::kSink) die("returns the state of an mbarrier, which the device does not have");
  builder.address(instruction, operands[1]);
  if (instruction.flag) instruction.b = builder.source(operands[2], kWord);
}
// p, [mbarrier], parity
void wait_operands(Builder& builder, Inst& instruction, const Variant& variant, const Operands& operands) {
  count_operands(operands, 3, 3);
  instruction.kind = Yielding;
  instruction.order = order_of(variant);
  instruction.space = Shared;
  instruction.d = builder.predicate_destination(operands[0]);
  builder.address(instruction, operands[1]);
  instruction.b = builder.source(operands[2], kWord);
}

// A load: [shared], [map, coordinates], [mbarrier]; a store: [map, coordinates], [shared].
void bulk_tensor_operands(Builder& builder, Inst& instruction, const Variant& variant, const Operands& operands) {
  const bool load = variant.has("shared::cluster");
  count_operands(operands, load ? 3 : 2, load ? 3 : 2);
  const Operand &tensor = operands[load ? 1 : 0], &shared = operands[load ? 0 : 1];
  instruction.space = Shared;
  instruction.flag = load;
  builder.address(instruction, shared);
  if (tensor.kind != Operand::kAddress || tensor.parts.size() != 2) die("takes a tensor map and coordinates");
  instruction.b = builder.source(tensor.parts[0], kDoubleWord);
  instruction.vec = static_cast<u8>(variant.words[4][0] - '0');
  register_list(builder, tensor.parts[1], kWord, false, instruction.vec, instruction.x);
  if (load) instruction.c = bare_address(builder, operands[2], kWord);
}
// [shared], registers, [mbarrier]
void st_async_operands(Builder& builder, Inst& instruction, const Variant& variant, const Operands& operands) {
  count_operands(operands, 3, 3);
  instruction.space = Shared;
  instruction.vec = static_cast<u8>(variant.vector());
  instruction.ds = variant.type().size;
  builder.address(instruction, operands[0]);
  register_list(builder, operands[1], variant.type(), false, instruction.vec, instruction.x);
  instruction.b = bare_address(builder, operands[2], kWord);
}

#define MBARRIER "[.shared.shared::cta].b64"

}  // namespace

const Rules& async_rules() {
  static const Rules rules = {
      {"cp.async{.ca.cg}{.shared.shared::cta}.global[.L2::64B.L2::128B.L2::256B]", nullptr, always<execute_cp_async>,
       cp_async_operands},
      {"cp.async.commit_group", "", always<execute_cp_async_commit>},
      {"cp.async.wait_group", "imm", always<execute_cp_async_wait>},
      {"cp.async.wait_all", "", always<execute_cp_async_wait>, wait_all},
      {"cp.async.bulk.tensor{.1d.2d.3d.4d.5d}.shared::cluster.global[.tile].mbarrier::complete_tx::bytes", nullptr,
       always<execute_bulk_tensor>, bulk_tensor_operands},
      {"cp.async.bulk.tensor{.1d.2d.3d.4d.5d}.global.shared::cta[.tile].bulk_group", nullptr,
       always<execute_bulk_tensor>, bulk_tensor_operands},
      {"cp.async.bulk.commit_group", "", always<execute_bulk_commit>},
      {"cp.async.bulk.wait_group[.read]", "imm", always<execute_bulk_wait>},
      {"mapa[.shared::cluster].u32", "d, a, b", always<execute_mapa>},
      {"mbarrier{.init.inval}" MBARRIER, nullptr, pick_mbarrier, mbarrier_operands},
      {"mbarrier.expect_tx[.relaxed][.cta.cluster]" MBARRIER, nullptr, pick_mbarrier, mbarrier_operands},
      {"mbarrier.arrive[.expect_tx][.release.relaxed][.cta.cluster]" MBARRIER, nullptr, pick_mbarrier, arrive_operands},
      {"mbarrier{.try_wait.test_wait}.parity[.acquire.relaxed][.cta.cluster]" MBARRIER, nullptr, pick_mbarrier,
       wait_operands},
      {"st.async[.weak].shared::cluster.mbarrier::complete_tx::bytes[.v2.v4]{.b32.b64.u32.u64.s32.s64.f32.f64}",
       nullptr, always<execute_st_async>, st_async_operands},
  };
  return rules;
}

}  // namespace soft
