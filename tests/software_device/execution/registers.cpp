// setmaxnreg: warps give registers back to their block, and wait until the block has what they ask for. PTX ISA,
// "Miscellaneous Instructions: setmaxnreg".
#include "execution/handlers.hpp"
#include "matrix/wgmma.hpp"

namespace soft {

namespace {

constexpr u32 kUnit = 8;  // registers are given to a warp in multiples of this

// The four warps of a warpgroup execute the same ones, with a barrier of the four between two.
void meet(Warp& warp, const Inst& inst) {
  const s64 registers = inst.imm;
  const u32 number = warp.state->setmaxnregs;
  if (registers < 24 || registers > 256 || registers % kUnit != 0) {
    fault(warp, inst, 0, "setmaxnreg to %d registers: it takes a multiple of 8 from 24 to 256",
          static_cast<int>(registers));
  }
  if (!warp.f->attributes.regs_bounded) {
    fault(warp, inst, 0, "setmaxnreg in a kernel with neither __launch_bounds__ nor __maxnreg__: ptxas ignores it");
  }
  check_warpgroup(warp, inst);
  for (u32 other = warp.index / 4 * 4; other < warp.index / 4 * 4 + 4; ++other) {
    const WarpState& state = *warp.block->warps[other].state;
    if (number == 0 || (state.setmaxnregs >= number && ordered(warp, state.setmaxnreg[(number - 1) % 2]))) continue;
    fault(warp, inst, 0, "a second setmaxnreg with no barrier since that of warp %u of its warpgroup", other);
  }
  take_step(warp, {&inst, 0, 0, false, warp.index});
  warp.state->setmaxnreg[number % 2] = stamp_of(warp);
  ++warp.state->setmaxnregs;
  const bool takes = inst.kind == TakeRegisters;
  const u32 held = warp.state->registers;
  if (takes ? registers < held : registers > held) {
    fault(warp, inst, 0, "setmaxnreg.%s to %d registers per thread, but its warp has %u", takes ? "inc" : "dec",
          static_cast<int>(registers), held);
  }
}

}  // namespace

void begin_registers(Block& block) {
  block.state->free_registers = 0;
  for (Warp& warp : block.warps) {
    warp.state->registers = (block.f->attributes.regs + kUnit - 1) / kUnit * kUnit;
    warp.state->setmaxnregs = 0;
  }
}

void execute_setmaxnreg_dec(Warp& warp, const Inst& inst) {
  meet(warp, inst);
  const u32 registers = static_cast<u32>(inst.imm);
  warp.block->state->free_registers += warp.state->registers - registers;
  warp.state->registers = registers;
  ++warp.block->cl->changes;
  for (Warp& other : warp.block->warps) {
    for (int x = 0; x < other.ng; ++x) {
      if (other.g[x].wait == AtRegisters) wake(other);
    }
  }
}

void request_registers(Warp& warp, const Inst& inst) { meet(warp, inst); }

bool take_registers(Warp& warp, const Inst& inst) {
  const u32 more = static_cast<u32>(inst.imm) - warp.state->registers;
  u32& free = warp.block->state->free_registers;
  if (free < more) return false;
  free -= more;
  warp.state->registers += more;
  ++warp.block->cl->changes;
  return true;
}

}  // namespace soft
