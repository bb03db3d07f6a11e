// setmaxnreg: warps give registers back to their block, and take them from it.
#include "warpgroup.hpp"

namespace emu {

namespace {

struct BlockRegisters {
  int free;               // registers per thread, summed over warps
  std::vector<int> held;  // by the threads of each warp
};

std::vector<BlockRegisters> blocks;  // of the cluster

BlockRegisters& registers_of(const Thread& thread) { return blocks[thread.block->rank]; }

int& held_by(const Thread& thread) { return registers_of(thread).held[thread.index / 32]; }

void meet(Collective what, const char* name, int registers, Site site) {
  Thread& thread = running();
  check_warpgroup(thread, name, site);
  const WarpgroupStep step = {name, registers, false, 0, 0, 0, 0, false, false, site};
  warp_collective(what, kWholeWarp, reinterpret_cast<uint64_t>(&step), 0, 32, site);
}

}  // namespace

void begin_registers() {
  const int registers = static_cast<int>(machine.launch.registers);
  blocks.assign(machine.cluster_blocks, {0, std::vector<int>(machine.blocks[0].warps.size(), registers)});
}

void complete_setmaxnreg(const Warp& warp, Collective what) {
  const Thread& thread = warp.threads[0];
  const WarpgroupStep& step = *reinterpret_cast<const WarpgroupStep*>(thread.value);
  take_step(warp, step);
  int& held = held_by(thread);
  const bool gives_back = what == Collective::kSetmaxnregDec;
  if (gives_back ? step.number >= held : step.number <= held) {
    fault(thread, step.site, "%s to %d registers per thread, but its warp has %d", step.name, step.number, held);
  }
  if (!gives_back) return;
  registers_of(thread).free += held - step.number;
  held = step.number;
  wake_all(Thread::kRegisters, 0, thread.block->threads, machine.block_threads);
}

void setmaxnreg_dec(int registers, Site site) { meet(Collective::kSetmaxnregDec, "setmaxnreg_dec", registers, site); }

void setmaxnreg_inc(int registers, Site site) {
  meet(Collective::kSetmaxnregInc, "setmaxnreg_inc", registers, site);
  Thread& thread = running();
  int& held = held_by(thread);
  for (int& free = registers_of(thread).free; held < registers;) {  // until one lane gets them for its warp
    if (free >= registers - held) {
      free -= registers - held;
      held = registers;
    } else {
      wait(thread, Thread::kRegisters, 0, site);
    }
  }
}

}  // namespace emu
