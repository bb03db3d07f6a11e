// Rules of what lanes, warps, blocks and clusters do together (PTX ISA, "Parallel Synchronization and Communication
// Instructions").
#include "execution/handlers.hpp"
#include "ptx/operands.hpp"

namespace soft {
namespace {

using Operands = std::vector<Operand>;

// shfl, match: d[|p], sources, mask.
size_t results(Builder& builder, Inst& instruction, const Operands& operands, size_t sources) {
  const size_t first = operands.size() > 1 && operands[1].second ? 2 : 1;
  count_operands(operands, first + sources + 1, first + sources + 1);
  instruction.kind = Collective;
  instruction.d = builder.destination(operands[0], kWord);
  if (first == 2) {
    instruction.flag = 1;
    instruction.e = builder.predicate_destination(operands[1]);
  }
  instruction.y[0] = builder.source(operands.back(), kWord);
  return first;
}
Handler pick_shuffle(const Variant& variant) { return shuffle_handler(variant.words[2]); }
void shuffle_operands(Builder& builder, Inst& instruction, const Variant&, const Operands& operands) {
  const size_t first = results(builder, instruction, operands, 3);
  instruction.a = builder.source(operands[first], kWord);
  instruction.b = builder.source(operands[first + 1], kWord);
  instruction.c = builder.source(operands[first + 2], kWord);
}
Handler pick_match(const Variant& variant) { return match_handler(variant.has("all"), variant.type().size); }
void match_operands(Builder& builder, Inst& instruction, const Variant& variant, const Operands& operands) {
  const size_t first = results(builder, instruction, operands, 1);
  instruction.a = builder.source(operands[first], variant.type());
}
Handler pick_reduce(const Variant& variant) { return reduce_handler(variant.words[2], variant.words.back()); }

void vote_operands(Builder& builder, Inst& instruction, const Variant& variant, const Operands& operands) {
  count_operands(operands, 3, 3);
  const bool ballot = variant.has("ballot");
  instruction.kind = Collective;
  instruction.flag = variant.has("all") ? 0 : variant.has("any") ? 1 : variant.has("uni") ? 2 : 3;
  instruction.d = ballot ? builder.destination(operands[0], kWord) : builder.predicate_destination(operands[0]);
  instruction.a = builder.predicate_source(operands[1]);
  if (operands[1].negated) instruction.flag |= 8;
  instruction.y[0] = builder.source(operands[2], kWord);
}
void elect_operands(Builder& builder, Inst& instruction, const Variant&, const Operands& operands) {
  count_operands(operands, 3, 3);
  instruction.kind = Collective;
  instruction.ds = operands[0].kind == Operand::kSink ? 0 : 4;
  if (instruction.ds) instruction.d = builder.destination(operands[0], kWord);
  instruction.e = builder.predicate_destination(operands[1]);
  instruction.y[0] = builder.source(operands[2], kWord);
}

// Barrier, and how many threads take part.
void barrier_operands(Builder& builder, Inst& instruction, const Variant& variant, const Operands& operands) {
  const bool arrive = variant.has("arrive");
  count_operands(operands, arrive ? 2 : 1, 2);
  instruction.kind = arrive ? BarArrive : BarSync;
  instruction.aligned = variant.words[0] == "bar" || variant.has("aligned");
  instruction.a = builder.source(operands[0], kWord);
  instruction.flag = operands.size() > 1;
  if (instruction.flag) instruction.b = builder.source(operands[1], kWord);
}
void reducing_barrier_operands(Builder& builder, Inst& instruction, const Variant& variant, const Operands& operands) {
  count_operands(operands, 3, 4);
  const bool counts = variant.has("popc");
  instruction.kind = BarRed;
  instruction.aligned = variant.words[0] == "bar" || variant.has("aligned");
  instruction.size = counts ? 0 : variant.has("and") ? 1 : 2;
  instruction.d = counts ? builder.destination(operands[0], kWord) : builder.predicate_destination(operands[0]);
  instruction.a = builder.source(operands[1], kWord);
  instruction.flag = operands.size() > 3;
  if (instruction.flag) instruction.b = builder.source(operands[2], kWord);
  instruction.c = builder.predicate_source(operands.back());
  instruction.vec = operands.back().negated;
}
void warp_barrier_operands(Builder& builder, Inst& instruction, const Variant&, const Operands& operands) {
  count_operands(operands, 1, 1);
  instruction.kind = WarpSync;
  instruction.y[0] = builder.source(operands[0], kWord);
}
void cluster_barrier(Builder&, Inst& instruction, const Variant& variant, const Operands&) {
  instruction.kind = variant.has("arrive") ? ClusterArrive : ClusterWait;
  instruction.flag = variant.has("relaxed");
}
void whole_warp(Builder&, Inst& instruction, const Variant&, const Operands&) {
  instruction.kind = Collective;
  instruction.aligned = true;
}
void taking_warp(Builder&, Inst& instruction, const Variant&, const Operands&) {
  instruction.kind = TakeRegisters;
  instruction.aligned = true;
}
void reduce_operands(Builder& builder, Inst& instruction, const Variant& variant, const Operands& operands) {
  count_operands(operands, 3, 3);
  instruction.kind = Collective;
  instruction.d = builder.destination(operands[0], kWord);
  instruction.a = builder.source(operands[1], variant.type());
  instruction.y[0] = builder.source(operands[2], kWord);
}

}  // namespace

const Rules& warp_rules() {
  static const Rules rules = {
      {"shfl.sync{.up.down.bfly.idx}.b32", nullptr, pick_shuffle, shuffle_operands},
      {"vote.sync{.all.any.uni}.pred", nullptr, always<execute_vote>, vote_operands},
      {"vote.sync.ballot.b32", nullptr, always<execute_vote>, vote_operands},
      {"activemask.b32", "d", always<execute_activemask>},
      {"match{.any.all}.sync{.b32.b64}", nullptr, pick_match, match_operands},
      {"redux.sync{.add.min.max}{.u32.s32}", nullptr, pick_reduce, reduce_operands},
      {"redux.sync{.and.or.xor}.b32", nullptr, pick_reduce, reduce_operands},
      {"elect.sync", nullptr, always<execute_elect>, elect_operands},
      {"bar[.cta]{.sync.arrive}", nullptr, nullptr, barrier_operands},
      {"barrier[.cta]{.sync.arrive}[.aligned]", nullptr, nullptr, barrier_operands},
      {"bar[.cta].red.popc.u32", nullptr, nullptr, reducing_barrier_operands},
      {"bar[.cta].red{.and.or}.pred", nullptr, nullptr, reducing_barrier_operands},
      {"barrier[.cta].red.popc[.aligned].u32", nullptr, nullptr, reducing_barrier_operands},
      {"barrier[.cta].red{.and.or}[.aligned].pred", nullptr, nullptr, reducing_barrier_operands},
      {"bar.warp.sync", nullptr, nullptr, warp_barrier_operands},
      {"barrier.cluster.arrive[.release.relaxed][.aligned]", "", nullptr, cluster_barrier},
      {"barrier.cluster.wait[.acquire][.aligned]", "", nullptr, cluster_barrier},
      {"setmaxnreg.dec.sync.aligned.u32", "imm", always<execute_setmaxnreg_dec>, whole_warp},
      {"setmaxnreg.inc.sync.aligned.u32", "imm", nullptr, taking_warp},
  };
  return rules;
}

}  // namespace soft
