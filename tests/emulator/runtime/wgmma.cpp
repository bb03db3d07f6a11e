// wgmma by one warp of its warpgroup: its 16 rows of a, times b. Until the wgmma_wait that covers it, no
// thread may use its accumulators or write its operands, and nothing has been multiplied.
#include <deque>
#include <list>

#include "warpgroup.hpp"
#include "wgmma_operand.hpp"

namespace emu {

uint32_t begin_reading();
void end_reading(uint32_t reading, Warp& warp);

namespace {

// What a lane brings to a wgmma.
struct WgmmaOperands {
  WarpgroupStep step;
  float* d;
  const uint32_t* a;  // null: in shared memory
};

const WgmmaOperands& operands_of(const Thread& thread) { return *reinterpret_cast<const WgmmaOperands*>(thread.value); }

// Accumulators in flight. The lanes' own hold a signalling NaN, which arithmetic makes a quiet one.
constexpr uint32_t kPoison = 0x7fa5a5a5;

constexpr size_t kBytesOfA = 16 * 16 * 2;  // per warp

struct Accumulators {
  int size;  // of each lane
  float* lane[32];
  std::vector<float> values;  // of one lane after another
  int unfinished;             // wgmma that add to them
};

struct Instruction {
  WarpgroupStep step;
  uint32_t group, reading;
  Accumulators* d;
  const uint32_t* a_registers[32];  // of each lane; null: in shared memory
  SharedOperand a, b;
  std::vector<uint8_t> bytes;  // of a, then b, when it was issued
};

// A lane's stack at the last wgmma_fence.
struct Stack {
  const char* begin;
  std::vector<char> bytes;
};

struct WarpState {
  bool fenced;         // since its last wgmma_wait
  bool waited;         // ever
  uint32_t committed;  // groups
  std::deque<Instruction> pending;
  std::list<Accumulators> in_flight;
  Stack stacks[32];
};

std::vector<WarpState> warp_states;  // of the cluster

WarpState& state_of(const Warp& warp) { return warp_states[warp_number(warp)]; }

// -- registers ----------------------------------------------------------------------------------------

void take_stacks(WarpState& state, const Warp& warp) {
  for (int lane = 0; lane < 32; ++lane) {
    const Thread& thread = warp.threads[lane];
    const void* pointer = &thread == &running() ? __builtin_frame_address(0) : thread.stack_pointer;
    Stack& stack = state.stacks[lane];
    stack.begin = static_cast<const char*>(pointer);
    stack.bytes.assign(stack.begin, thread.stack_top);
  }
}

// Do a lane's registers hold what they held at the last wgmma_fence?
bool unchanged(const Stack& stack, const void* registers, size_t bytes) {
  const auto* begin = static_cast<const char*>(registers);
  return begin >= stack.begin && begin + bytes <= stack.begin + stack.bytes.size() &&
         memcmp(begin, stack.bytes.data() + (begin - stack.begin), bytes) == 0;
}

void check_fence(const WarpState& state, const Warp& warp, bool continues, Site site) {
  const WgmmaOperands& first = operands_of(warp.threads[0]);
  if (!state.fenced && (!continues || first.a)) {
    fault(warp.threads[0], site, "wgmma with no wgmma_fence since %s",
          state.waited ? "the last wgmma_wait" : "the kernel began");
  }
  for (int lane = 0; lane < 32; ++lane) {
    const WgmmaOperands& operands = operands_of(warp.threads[lane]);
    if (first.step.accumulate && !continues &&
        !unchanged(state.stacks[lane], operands.d, first.step.number / 2 * sizeof(float))) {
      fault(warp.threads[lane], site, "the accumulators of a wgmma changed after the wgmma_fence");
    }
    if (first.a && !unchanged(state.stacks[lane], operands.a, 4 * sizeof(uint32_t))) {
      fault(warp.threads[lane], site, "the registers of a wgmma changed after the wgmma_fence");
    }
  }
}

void check_poison(const Accumulators& d, const Warp& warp, Site site) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < d.size; ++i) {
      if (memcmp(d.lane[lane] + i, &kPoison, sizeof kPoison) == 0) continue;
      fault(warp.threads[lane], site, "the accumulators of a wgmma were written before its wgmma_wait");
    }
  }
}

// Those in flight that are the instruction's own; null: none.
Accumulators* find_in_flight(WarpState& state, const Warp& warp, Site site) {
  const int size = operands_of(warp.threads[0]).step.number / 2;
  for (Accumulators& other : state.in_flight) {
    int same = 0;
    for (int lane = 0; lane < 32; ++lane) {
      const float* d = operands_of(warp.threads[lane]).d;
      if (d + size <= other.lane[lane] || other.lane[lane] + other.size <= d) continue;
      if (d != other.lane[lane] || size != other.size) {
        fault(warp.threads[lane], site, "wgmma to part of the accumulators, or to more, of one in flight");
      }
      ++same;
    }
    if (same == 32) return &other;
    if (same != 0) fault(warp.threads[0], site, "lanes of a warp bring different accumulators to a wgmma in flight");
  }
  return nullptr;
}

Accumulators* take_accumulators(WarpState& state, const Warp& warp) {
  state.in_flight.emplace_back();
  Accumulators& d = state.in_flight.back();
  d.size = operands_of(warp.threads[0]).step.number / 2;
  d.unfinished = 0;
  d.values.resize(32 * d.size);
  for (int lane = 0; lane < 32; ++lane) {
    d.lane[lane] = operands_of(warp.threads[lane]).d;
    memcpy(&d.values[lane * d.size], d.lane[lane], d.size * sizeof(float));
    for (int i = 0; i < d.size; ++i) memcpy(d.lane[lane] + i, &kPoison, sizeof kPoison);
  }
  return &d;
}

void give_back(WarpState& state, Accumulators* d) {
  for (int lane = 0; lane < 32; ++lane) memcpy(d->lane[lane], &d->values[lane * d->size], d->size * sizeof(float));
  state.in_flight.remove_if([d](const Accumulators& other) { return &other == d; });
}

// -- wgmma --------------------------------------------------------------------------------------------

void check_lanes_agree(const Warp& warp, Site site) {
  const WarpgroupStep& first = operands_of(warp.threads[0]).step;
  for (int lane = 1; lane < 32; ++lane) {
    if (const char* what = difference(first, operands_of(warp.threads[lane]).step)) {
      fault(warp.threads[lane], site, "wgmma of a lane that differs in %s from lane 0", what);
    }
  }
}

// 16 x 16 elements.
void transpose(uint8_t* bytes) {
  uint16_t from[16][16], to[16][16];
  memcpy(from, bytes, sizeof from);
  for (int i = 0; i < 256; ++i) to[i % 16][i / 16] = from[i / 16][i % 16];
  memcpy(bytes, to, sizeof to);
}

// The warp's 16 rows of a, and b, as they are now.
void copy_operands(const Block& block, const Instruction& instruction, std::vector<uint8_t>& bytes) {
  bytes.resize(kBytesOfA + instruction.b.bytes());
  if (!instruction.a_registers[0]) copy(block, instruction.a, bytes.data());
  if (instruction.a.mn_major) transpose(bytes.data());
  for (int lane = 0; instruction.a_registers[0] && lane < 32; ++lane) {
    for (int j = 0; j < 4; ++j) {
      const int row = lane / 4 + 8 * (j % 2), word = lane % 4 + 4 * (j / 2);
      memcpy(&bytes[row * 32 + word * 4], instruction.a_registers[lane] + j, 4);
    }
  }
  copy(block, instruction.b, bytes.data() + kBytesOfA);
}

void issue(WarpState& state, Warp& warp, Site site) {
  check_lanes_agree(warp, site);
  const Thread& thread = warp.threads[0];
  const WgmmaOperands& first = operands_of(thread);
  const WarpgroupStep& step = first.step;
  take_step(warp, step);
  Accumulators* d = find_in_flight(state, warp, site);
  check_fence(state, warp, d != nullptr, site);

  Instruction instruction = {};
  instruction.step = step;
  instruction.group = state.committed;
  instruction.reading = begin_reading();
  for (int lane = 0; lane < 32; ++lane) instruction.a_registers[lane] = operands_of(warp.threads[lane]).a;
  instruction.b.mn_major = first.a || step.by_columns;
  instruction.b.lines = instruction.b.mn_major ? 16 : step.number;
  instruction.b.chunks = instruction.b.mn_major ? step.number / 8 : 2;
  if (!first.a) {
    const int of_group = thread.index / 32 % 4;
    instruction.a.mn_major = step.by_columns;
    (step.by_columns ? instruction.a.first_chunk : instruction.a.first_line) = of_group * (step.by_columns ? 2 : 16);
    instruction.a.lines = 16;
    instruction.a.chunks = 2;
    decode(thread, "a", step.a, step.upper_a, instruction.a, site);
    begin_reading(warp, instruction.a, instruction.reading, site);
  }
  decode(thread, "b", step.b, step.upper, instruction.b, site);
  begin_reading(warp, instruction.b, instruction.reading, site);
  copy_operands(*thread.block, instruction, instruction.bytes);

  instruction.d = d ? d : take_accumulators(state, warp);
  ++instruction.d->unfinished;
  state.pending.push_back(std::move(instruction));
  ++machine.counters.wgmma;
}

void execute(const Instruction& instruction, const Warp& warp) {
  const WarpgroupStep& step = instruction.step;
  const Thread& thread = warp.threads[0];
  static std::vector<uint8_t> bytes;
  copy_operands(*thread.block, instruction, bytes);
  if (instruction.a_registers[0] && memcmp(bytes.data(), instruction.bytes.data(), kBytesOfA) != 0) {
    fault(thread, step.site, "the registers of a wgmma changed before its wgmma_wait");
  }
  if (bytes != instruction.bytes) fault(thread, step.site, "shared memory was overwritten while a wgmma reads it");
  std::vector<float>& d = instruction.d->values;
  if (!step.accumulate) d.assign(d.size(), 0.0f);
  multiply(step.half, bytes.data(), instruction.b, bytes.data() + kBytesOfA, d.data());
}

void complete_all_but(WarpState& state, Warp& warp, uint64_t groups) {
  while (!state.pending.empty() && state.pending.front().group + groups < state.committed) {
    const Instruction& instruction = state.pending.front();
    execute(instruction, warp);
    end_reading(instruction.reading, warp);
    if (--instruction.d->unfinished == 0) {
      check_poison(*instruction.d, warp, instruction.step.site);
      give_back(state, instruction.d);
    }
    state.pending.pop_front();
  }
}

void meet(Collective what, const char* name, uint64_t value, Site site) {
  check_warpgroup(running(), name, site);
  warp_collective(what, kWholeWarp, value, 0, 32, site);
}

}  // namespace

void begin_wgmma() {
  warp_states.clear();
  warp_states.resize(machine.cluster_blocks * machine.blocks[0].warps.size());
}

void complete_wgmma(Warp& warp, Collective what, Site site) {
  WarpState& state = state_of(warp);
  switch (what) {
    case Collective::kWgmmaFence:
      take_stacks(state, warp);
      state.fenced = true;
      return;
    case Collective::kWgmmaCommit:
      ++state.committed;
      return;
    case Collective::kWgmmaWait:
      complete_all_but(state, warp, warp.threads[0].value);
      state.fenced = false;
      state.waited = true;
      return;
    default:
      issue(state, warp, site);
  }
}

void check_wgmma_waited(const Thread& thread) {
  const WarpState& state = state_of(*thread.warp);
  if (state.pending.empty()) return;
  const Instruction& first = state.pending.front();
  fault(thread, first.step.site, "exited with %zu wgmma in flight that it never waited for, the first one %s",
        state.pending.size(), first.group < state.committed ? "committed" : "not committed");
}

void wgmma_fence(Site site) { meet(Collective::kWgmmaFence, "wgmma_fence", 0, site); }

void wgmma_commit(Site site) { meet(Collective::kWgmmaCommit, "wgmma_commit", 0, site); }

void wgmma_wait(int pending, Site site) {
  meet(Collective::kWgmmaWait, "wgmma_wait", static_cast<uint64_t>(pending), site);
}

void wgmma(bool half, int columns, float* d, const unsigned int* a_registers, unsigned int a, unsigned int b,
           unsigned int upper, bool accumulate, Site site, bool by_columns, unsigned int upper_a) {
  const char* name = a_registers ? "wgmma_rs" : by_columns ? "wgmma_ss_by_columns" : "wgmma_ss";
  const WgmmaOperands operands = {
      {name, columns, half, a, b, by_columns ? upper_a : upper, upper, accumulate, by_columns, site}, d, a_registers};
  meet(Collective::kWgmma, name, reinterpret_cast<uint64_t>(&operands), site);
}

}  // namespace emu
