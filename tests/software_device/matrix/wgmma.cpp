// wgmma by one warp of its warpgroup: its 16 rows of a, times b. Until the wait_group that covers it, nothing may touch
// its accumulators or write its operands, and nothing has been multiplied: as late as allowed. PTX ISA,
// "wgmma.mma_async", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group".
#include "matrix/wgmma.hpp"

#include <algorithm>

#include "execution/counters.hpp"
#include "execution/handlers.hpp"
#include "matrix/numbers.hpp"

namespace soft {

bool wgmma_in_flight(const Warp& warp) { return !warp.state->wgmma->in_flight.empty(); }

namespace {

constexpr u32 kPoison = 0x7fa5a5a5;        // a signalling NaN: arithmetic makes a quiet one
constexpr size_t kBytesOfA = 16 * 16 * 2;  // per warp

size_t slot_of(u32 offset) { return offset / 128; }  // registers of four bytes have 128 for the warp

void check_poison(Warp& warp, const Accumulators& d, const Inst& inst) {
  for (const u32 offset : *d.registers) {
    for (int lane = 0; lane < 32; ++lane) {
      if (R<u32>(warp, offset)[lane] == kPoison) continue;
      fault(warp, inst, lane, "the accumulators of a wgmma were written before its wgmma.wait_group");
    }
  }
}

// Those in flight that are the instruction's own; null: none.
Accumulators* find_in_flight(Warp& warp, const Inst& inst, const std::vector<u32>& registers) {
  for (Accumulators& other : warp.state->wgmma->in_flight) {
    if (*other.registers == registers) return &other;
    for (const u32 offset : registers) {
      if (std::find(other.registers->begin(), other.registers->end(), offset) == other.registers->end()) continue;
      fault(warp, inst, 0, "wgmma to part of the accumulators, to more, or in another order, of one in flight");
    }
  }
  return nullptr;
}

Accumulators* take_accumulators(Warp& warp, const std::vector<u32>& registers) {
  WgmmaState& state = *warp.state->wgmma;
  state.in_flight.emplace_back();
  Accumulators& d = state.in_flight.back();
  const size_t size = registers.size();
  d = {&registers, std::vector<float>(32 * size), 0};
  state.touched.resize(slot_of(warp.f->regs_bytes) + 1);
  for (size_t i = 0; i < size; ++i) {
    state.touched[slot_of(registers[i])] = true;
    for (size_t lane = 0; lane < 32; ++lane) {
      d.values[lane * size + i] = R<float>(warp, registers[i])[lane];
      R<u32>(warp, registers[i])[lane] = kPoison;
    }
  }
  return &d;
}

void give_back(Warp& warp, Accumulators* d) {
  WgmmaState& state = *warp.state->wgmma;
  const size_t size = d->registers->size();
  for (size_t i = 0; i < size; ++i) {
    const u32 offset = (*d->registers)[i];
    state.touched[slot_of(offset)] = false;
    for (size_t lane = 0; lane < 32; ++lane) R<float>(warp, offset)[lane] = d->values[lane * size + i];
  }
  state.in_flight.remove_if([d](const Accumulators& other) { return &other == d; });
}

// 16 x 16 elements.
void transpose(char* bytes) {
  unsigned short from[16][16], to[16][16];
  memcpy(from, bytes, sizeof from);
  for (int i = 0; i < 256; ++i) to[i % 16][i / 16] = from[i / 16][i % 16];
  memcpy(bytes, to, sizeof to);
}

// The warp's 16 rows of a, and b, as they are now.
void copy_operands(Warp& warp, const PendingWgmma& wgmma, std::vector<char>& bytes) {
  bytes.resize(kBytesOfA + wgmma.b.bytes());
  if (wgmma.inst->flag & 2) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int j = 0; j < 4; ++j) {
        const int row = lane / 4 + 8 * (j % 2), word = lane % 4 + 4 * (j / 2);
        memcpy(&bytes[static_cast<size_t>(row * 32 + word * 4)], R<u32>(warp, wgmma.inst->x[j]) + lane, 4);
      }
    }
  } else {
    copy_operand(*warp.block, wgmma.a, bytes.data());
    if (wgmma.a.mn_major) transpose(bytes.data());
  }
  copy_operand(*warp.block, wgmma.b, bytes.data() + kBytesOfA);
}

void execute(Warp& warp, const PendingWgmma& wgmma) {
  static std::vector<char> bytes;
  copy_operands(warp, wgmma, bytes);
  if ((wgmma.inst->flag & 2) && memcmp(bytes.data(), wgmma.bytes.data(), kBytesOfA) != 0) {
    fault(warp, *wgmma.inst, 0, "the registers of a wgmma changed before its wgmma.wait_group");
  }
  if (bytes != wgmma.bytes) {
    fault(warp, *wgmma.inst, 0, "shared memory was overwritten while a wgmma reads it");
  }
  std::vector<float>& d = wgmma.d->values;
  if (!wgmma.accumulate) d.assign(d.size(), 0.0f);
  multiply(wgmma.inst->flag & 1, bytes.data(), wgmma.b, bytes.data() + kBytesOfA, d.data());
  if (!(wgmma.inst->flag & 2)) record_reading(warp, wgmma.a);
  record_reading(warp, wgmma.b);
}

u64 same_in_all_lanes(Warp& warp, const Inst& inst, u32 offset, const char* name) {
  const u64* const value = R<u64>(warp, offset);
  for (int lane = 1; lane < 32; ++lane) {
    if (value[lane] == value[0]) continue;
    fault(warp, inst, lane, "wgmma of a lane that differs in the descriptor of %s from lane 0", name);
  }
  return value[0];
}

}  // namespace

// An instruction that is no wgmma must not touch accumulators in flight. The decoder leaves unused operands 0, and
// register 0 is none of theirs.
void check_wgmma_registers(Warp& warp, const Inst& inst) {
  if (inst.fn == execute_wgmma || inst.kind == Bra || inst.kind == Exit) return;
  const std::vector<bool>& touched = warp.state->wgmma->touched;
  const auto check = [&](u32 offset) {
    if (offset == 0 || slot_of(offset) >= touched.size() || !touched[slot_of(offset)]) return;
    bool is_accumulator = false;
    for (const Accumulators& d : warp.state->wgmma->in_flight) {
      is_accumulator |= std::find(d.registers->begin(), d.registers->end(), offset) != d.registers->end();
    }
    if (!is_accumulator) return;
    fault(warp, inst, 0, "touches an accumulator of a wgmma in flight: there is no wgmma.wait_group between");
  };
  for (const u32 offset : {inst.d, inst.a, inst.b, inst.c, inst.e}) check(offset);
  for (const u32 offset : inst.x) check(offset);
  for (const u32 offset : inst.y) check(offset);
}

void execute_wgmma(Warp& warp, const Inst& inst) {
  check_warpgroup(warp, inst);
  WgmmaState& state = *warp.state->wgmma;
  const bool in_registers = inst.flag & 2;
  const std::vector<u32>& registers = warp.f->lists[inst.extra];
  const u32 accumulate = *R<u32>(warp, inst.c);
  if (accumulate != 0 && accumulate != ~0u) {
    fault(warp, inst, first_lane(~accumulate), "wgmma of a lane that differs in scale-d from others");
  }
  const u64 b = same_in_all_lanes(warp, inst, inst.b, "b");
  const u64 a = in_registers ? 0 : same_in_all_lanes(warp, inst, inst.a, "a");
  take_step(warp, {&inst, a, b, accumulate != 0, warp.index});
  Accumulators* const d = find_in_flight(warp, inst, registers);
  if (!state.fenced && (!d || in_registers)) {
    fault(warp, inst, 0, "wgmma with no wgmma.fence since %s",
          state.waited ? "the last wgmma.wait_group" : "the kernel began");
  }

  PendingWgmma wgmma = {&inst, state.committed, accumulate != 0, nullptr, {}, {}, {}};
  const int columns = static_cast<int>(inst.imm);
  wgmma.b.mn_major = inst.flag & 4;
  wgmma.b.lines = wgmma.b.mn_major ? 16 : columns;
  wgmma.b.chunks = wgmma.b.mn_major ? columns / 8 : 2;
  if (!in_registers) {
    wgmma.a.mn_major = inst.flag & 8;
    const int of_group = static_cast<int>(warp.index % 4);
    (wgmma.a.mn_major ? wgmma.a.first_chunk : wgmma.a.first_line) = of_group * (wgmma.a.mn_major ? 2 : 16);
    wgmma.a.lines = 16;
    wgmma.a.chunks = 2;
    decode(warp, inst, "a", a, wgmma.a);
    check_operand(warp, inst, wgmma.a);
  }
  decode(warp, inst, "b", b, wgmma.b);
  check_operand(warp, inst, wgmma.b);
  copy_operands(warp, wgmma, wgmma.bytes);
  wgmma.d = d ? d : take_accumulators(warp, registers);
  ++wgmma.d->unfinished;
  state.pending.push_back(std::move(wgmma));
  ++counters().wgmma;
}

void execute_wgmma_fence(Warp& warp, const Inst& inst) {
  check_warpgroup(warp, inst);
  warp.state->wgmma->fenced = true;
}

void execute_wgmma_commit(Warp& warp, const Inst& inst) {
  check_warpgroup(warp, inst);
  ++warp.state->wgmma->committed;
}

void execute_wgmma_wait(Warp& warp, const Inst& inst) {
  check_warpgroup(warp, inst);
  WgmmaState& state = *warp.state->wgmma;
  while (!state.pending.empty() && state.pending.front().group + static_cast<u64>(inst.imm) < state.committed) {
    const PendingWgmma& wgmma = state.pending.front();
    execute(warp, wgmma);
    if (--wgmma.d->unfinished == 0) {
      check_poison(warp, *wgmma.d, *wgmma.inst);
      give_back(warp, wgmma.d);
    }
    state.pending.pop_front();
  }
  state.fenced = false;
  state.waited = true;
}

}  // namespace soft
