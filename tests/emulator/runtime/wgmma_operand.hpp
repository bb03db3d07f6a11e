// Operands of wgmma in shared memory, and the product itself.
#pragma once

#include "state.hpp"

namespace emu {

// Where shared memory starts in descriptors: not at 0, as on a GPU.
constexpr uint32_t kSharedBase = 1024;

// A matrix in shared memory, in chunks of 16 bytes. K-major: a line is a row of `a` or a column of `b`, two chunks of
// k. MN-major: a line is a k.
struct SharedOperand {
  bool mn_major;
  uint32_t start, leading, stride,
      span;  // bytes; the last is that of a line in a panel
  int first_line, first_chunk, lines, chunks;

  size_t bytes() const { return static_cast<size_t>(lines) * chunks * 16; }
};

// Its lines and `mn_major` come from the instruction, the rest from the descriptor. Faults where tensor cores would
// find no matrix.
void decode(const Thread& thread, const char* name, uint32_t lower, uint32_t upper, SharedOperand& operand, Site site);
// Checks that all lanes of the warp may have it read; until `reading` ends nobody may write it.
void begin_reading(Warp& warp, const SharedOperand& operand, uint32_t reading, Site site);
void copy(const Block& block, const SharedOperand& operand, uint8_t* out);

// d += a * b. a: 16 rows of 16 elements; b_bytes: a copy of b; d: the accumulators of one lane after another's.
void multiply(bool half, const uint8_t* a_rows, const SharedOperand& b, const uint8_t* b_bytes, float* d);

}  // namespace emu
