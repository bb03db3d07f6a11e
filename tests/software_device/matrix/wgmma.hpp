// wgmma: instructions in flight, their accumulators, and their operands in shared memory.
#pragma once

#include <algorithm>
#include <deque>
#include <list>

#include "memory/access.hpp"

namespace soft {

// A matrix in shared memory, in chunks of 16 bytes. K-major: a line is a row of `a` or a column of `b`, two chunks of
// k. MN-major: a line is a k.
struct SharedOperand {
  bool mn_major = false;
  u32 start = 0, leading = 0, stride = 0, span = 0;  // bytes; the last is that of a line in a panel
  int first_line = 0, first_chunk = 0, lines = 0, chunks = 0;

  size_t bytes() const { return static_cast<size_t>(lines) * static_cast<size_t>(chunks) * 16; }
};

// Its lines and `mn_major` come from the instruction, the rest from the descriptor. Faults where tensor cores would
// find no matrix.
void decode(const Warp& warp, const Inst& inst, const char* name, u64 descriptor, SharedOperand& operand);
// Checks that the warp may have it read.
void check_operand(Warp& warp, const Inst& inst, const SharedOperand& operand);
void record_reading(Warp& warp, const SharedOperand& operand);  // it has been read
void copy_operand(const Block& block, const SharedOperand& operand, char* out);
// d += a * b. a: 16 rows of 16 elements; b_bytes: a copy of b; d: the accumulators of one lane after another's.
void multiply(bool is_bfloat, const char* a_rows, const SharedOperand& b, const char* b_bytes, float* d);

// Accumulators in flight. Their registers hold a signalling NaN, which nothing may touch.
struct Accumulators {
  const std::vector<u32>* registers;
  std::vector<float> values;  // of one lane after another
  int unfinished;             // wgmma that add to them
};

struct PendingWgmma {
  const Inst* inst;
  u32 group;
  bool accumulate;
  Accumulators* d;
  SharedOperand a, b;
  std::vector<char> bytes;  // of a's 16 rows of the warp, then b, when it was issued
};

struct WgmmaState {
  bool fenced = false;  // since its last wait
  bool waited = false;  // ever
  u32 committed = 0;    // groups
  std::deque<PendingWgmma> pending;
  std::list<Accumulators> in_flight;
  std::vector<bool> touched;  // by offset of a register / 128: in flight

  void clear() {
    fenced = waited = false;
    committed = 0;
    pending.clear();
    in_flight.clear();
    touched.clear();
  }
};

// A wgmma or setmaxnreg of a warpgroup that not all four warps have executed yet.
struct WarpgroupStep {
  const Inst* inst;
  u64 a, b;
  bool accumulate;
  u32 first_warp;
};

struct Warpgroup {
  std::deque<WarpgroupStep> steps;
  u32 forgotten = 0, taken[4] = {};  // steps before those; steps of each warp

  void clear() {
    steps.clear();
    forgotten = 0;
    std::fill(taken, taken + 4, 0);
  }
};

struct Warpgroups {
  std::vector<Warpgroup> groups;
};

void take_step(const Warp& warp, const WarpgroupStep& step);  // matrix/warpgroup.cpp
void check_warpgroup(const Warp& warp, const Inst& inst);
void check_wgmma_exit(const Warp& warp);

}  // namespace soft
