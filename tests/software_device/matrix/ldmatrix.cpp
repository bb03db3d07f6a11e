// ldmatrix and stmatrix: 8 x 8 matrices of 16-bit elements; lane l holds elements 2 (l % 4) and the next of row l / 4,
// and the lanes 8 i to 8 i + 7 bring the addresses of the rows of matrix i. PTX ISA, "Warp-level Matrix Load
// Instruction: ldmatrix", "Warp-level Matrix Store Instruction: stmatrix".
#include <algorithm>

#include "execution/counters.hpp"
#include "execution/handlers.hpp"

namespace soft {

namespace {

// A matrix goes at once if its eight rows lie in different groups of four banks, or are the same.
void count(const u64* rows, int matrices) {
  ++counters().ldmatrix;
  if (!counting()) return;
  for (int m = 0; m < matrices; ++m) {
    u64 row[8];
    int rows_in_group[8] = {}, passes = 0;
    for (int i = 0; i < 8; ++i) {
      row[i] = rows[8 * m + i] / 16;
      int& in_group = rows_in_group[row[i] % 8];
      if (in_group == 0 || std::find(row, row + i, row[i]) == row + i) passes = std::max(passes, ++in_group);
    }
    counters().shared_wavefronts += static_cast<u64>(passes);
    ++counters().shared_wavefronts_ideal;
  }
}

}  // namespace

void execute_ldmatrix(Warp& warp, const Inst& inst) {
  u16 element[4][8][8];
  u64 rows[32];
  for (int lane = 0; lane < 8 * inst.vec; ++lane) {
    rows[lane] = address_of(warp, inst, lane);
    memcpy(element[lane / 8][lane % 8], locate(warp, inst, lane, rows[lane], 16, Use::kRead), 16);
  }
  for (int m = 0; m < inst.vec; ++m) {
    u32* const result = R<u32>(warp, inst.x[m]);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, pair = lane % 4 * 2;
      const u32 low = inst.flag ? element[m][pair][g] : element[m][g][pair];
      const u32 high = inst.flag ? element[m][pair + 1][g] : element[m][g][pair + 1];
      result[lane] = low | high << 16;
    }
  }
  count(rows, inst.vec);
}

void execute_stmatrix(Warp& warp, const Inst& inst) {
  u64 rows[32];
  for (int m = 0; m < inst.vec; ++m) {
    const u32* const value = R<u32>(warp, inst.x[m]);
    u16 element[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      for (int e = 0; e < 2; ++e) {
        const int row = lane / 4, column = lane % 4 * 2 + e;
        (inst.flag ? element[column][row] : element[row][column]) = static_cast<u16>(value[lane] >> 16 * e);
      }
    }
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * m + row;
      rows[lane] = address_of(warp, inst, lane);
      memcpy(locate(warp, inst, lane, rows[lane], 16, Use::kWrite), element[row], 16);
    }
  }
  count(rows, inst.vec);
}

}  // namespace soft
