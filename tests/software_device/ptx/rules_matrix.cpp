// Rules of the matrix instructions (PTX ISA, "Warp Level Matrix Instructions", "Asynchronous Warpgroup Level Matrix
// Instructions"). All lanes of a warp execute them together.
#include "execution/handlers.hpp"
#include "ptx/operands.hpp"

namespace soft {
namespace {

using Operands = std::vector<Operand>;

void whole_warp(Inst& instruction) {
  instruction.kind = Collective;
  instruction.aligned = true;
}

void ldmatrix_operands(Builder& builder, Inst& instruction, const Variant& variant, const Operands& operands) {
  count_operands(operands, 2, 2);
  const bool load = variant.words[0] == "ldmatrix";
  whole_warp(instruction);
  instruction.space = space_of(variant);
  instruction.vec = variant.has("x4") ? 4 : variant.has("x2") ? 2 : 1;
  instruction.flag = variant.has("trans");
  register_list(builder, operands[load ? 0 : 1], kWord, load, instruction.vec, instruction.x);
  builder.address(instruction, operands[load ? 1 : 0]);
}

// mma.sync.aligned.shape.row.col.dtype.atype.btype.ctype
Handler pick_mma(const Variant& variant) { return mma_handler(variant.words[3], variant.words[7]); }
template <int a, int b, int cd>
void mma_operands(Builder& builder, Inst& instruction, const Variant& variant, const Operands& operands) {
  count_operands(operands, 4, 4);
  const Type type = variant.has("f64") ? kDoubleWord : kWord;
  whole_warp(instruction);
  register_list(builder, operands[0], type, true, cd, instruction.x + 4);
  register_list(builder, operands[1], type, false, a, instruction.x);
  register_list(builder, operands[2], type, false, b, instruction.y);
  register_list(builder, operands[3], type, false, cd, instruction.y + 4);
}

// d, descriptor or registers of a, descriptor of b, scale-d, imm-scale-a, imm-scale-b[, imm-trans-a], imm-trans-b
void wgmma_operands(Builder& builder, Inst& instruction, const Variant& variant, const Operands& operands) {
  const bool in_registers = operands.size() > 1 && operands[1].kind == Operand::kVector;
  count_operands(operands, in_registers ? 7 : 8, in_registers ? 7 : 8);
  whole_warp(instruction);
  instruction.imm = std::stoi(variant.words[4].substr(4));
  if (constant_operand(operands[4]) != 1 || constant_operand(operands[5]) != 1) die("negates an operand");
  instruction.flag = (variant.has("bf16") ? 1 : 0) | (in_registers ? 2 : 0) |
                     (constant_operand(operands.back()) ? 4 : 0) |
                     (!in_registers && constant_operand(operands[6]) ? 8 : 0);
  std::vector<u32> accumulators(static_cast<size_t>(instruction.imm) / 2);
  register_list(builder, operands[0], kWord, true, accumulators.size(), accumulators.data());
  instruction.extra = static_cast<u32>(builder.function.lists.size());
  builder.function.lists.push_back(accumulators);
  if (in_registers)
    register_list(builder, operands[1], kWord, false, 4, instruction.x);
  else
    instruction.a = builder.source(operands[1], kDoubleWord);
  instruction.b = builder.source(operands[2], kDoubleWord);
  instruction.c = builder.predicate_source(operands[3]);
}
void wgmma_group(Builder&, Inst& instruction, const Variant&, const Operands&) { whole_warp(instruction); }

}  // namespace

const Rules& matrix_rules() {
  static const std::string wgmma = [] {
    std::string opcode = "wgmma.mma_async.sync.aligned{";
    for (int n = 8; n <= 256; n += 8) opcode += ".m64n" + std::to_string(n) + "k16";
    return opcode + "}.f32";
  }();
  static const std::string wgmma_half = wgmma + ".f16.f16", wgmma_brain = wgmma + ".bf16.bf16";
  static const Rules rules = {
      {"ldmatrix.sync.aligned.m8n8{.x1.x2.x4}[.trans][.shared.shared::cta].b16", nullptr, always<execute_ldmatrix>,
       ldmatrix_operands},
      {"stmatrix.sync.aligned.m8n8{.x1.x2.x4}[.trans][.shared.shared::cta].b16", nullptr, always<execute_stmatrix>,
       ldmatrix_operands},
      {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", nullptr, pick_mma, mma_operands<4, 2, 4>},
      {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", nullptr, pick_mma, mma_operands<4, 2, 4>},
      {"mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32", nullptr, pick_mma, mma_operands<2, 1, 4>},
      {"mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32", nullptr, pick_mma, mma_operands<2, 1, 4>},
      {"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", nullptr, pick_mma, mma_operands<4, 2, 4>},
      {"mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64", nullptr, pick_mma, mma_operands<1, 1, 2>},
      {wgmma_half.c_str(), nullptr, always<execute_wgmma>, wgmma_operands},
      {wgmma_brain.c_str(), nullptr, always<execute_wgmma>, wgmma_operands},
      {"wgmma.fence.sync.aligned", "", always<execute_wgmma_fence>, wgmma_group},
      {"wgmma.commit_group.sync.aligned", "", always<execute_wgmma_commit>, wgmma_group},
      {"wgmma.wait_group.sync.aligned", "imm", always<execute_wgmma_wait>, wgmma_group},
  };
  return rules;
}

}  // namespace soft
