// Collectives that move and multiply matrices: ldmatrix, stmatrix, and the way to multiply().
#include <algorithm>

#include "matrix.hpp"

namespace emu {

const uint8_t* read_row(Warp& warp, int lane, const void* ptr, uint32_t me, Site site);
void write_row(Warp& warp, int lane, void* ptr, const void* value, Site site);

namespace {

constexpr uint32_t kWholeWarp = 0xffffffff;

// What a lane brings to an ldmatrix or stmatrix: the address of a row, and its registers.
struct RowOperands {
  void* row;
  uint32_t* r;
};

const RowOperands& rows_of(const Thread& thread) { return *reinterpret_cast<const RowOperands*>(thread.value); }

// A matrix goes at once if its eight rows lie in different groups of four banks, or are the same.
void count_wavefronts(const Warp& warp) {
  for (int first = 0; first < 32; first += 8) {
    uint64_t row[8];
    int rows_in_group[8] = {}, passes = 0;
    for (int i = 0; i < 8; ++i) {
      row[i] = reinterpret_cast<uint64_t>(rows_of(warp.threads[first + i]).row) / 16;
      int& rows = rows_in_group[row[i] % 8];
      if (rows == 0 || std::find(row, row + i, row[i]) == row + i) passes = std::max(passes, ++rows);
    }
    machine.counters.shared_wavefronts += passes;
    machine.counters.shared_wavefronts_ideal += 1;
  }
}

// Lane l holds elements 2 (l % 4) and the next of row l / 4.
void load_matrices(Warp& warp, bool transposed, Site site) {
  uint16_t element[4][8][8];
  const uint32_t me = stamp_of(warp);
  for (int lane = 0; lane < 32; ++lane) {
    const void* row = rows_of(warp.threads[lane]).row;
    memcpy(element[lane / 8][lane % 8], read_row(warp, lane, row, me, site), 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = transposed ? element[i][pair][g] : element[i][g][pair];
      const uint32_t high = transposed ? element[i][pair + 1][g] : element[i][g][pair + 1];
      rows_of(warp.threads[lane]).r[i] = low | high << 16;
    }
  }
}

void store_matrices(Warp& warp, Site site) {
  uint32_t word[4][8][4];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) word[i][lane / 4][lane % 4] = rows_of(warp.threads[lane]).r[i];
  }
  for (int lane = 0; lane < 32; ++lane) {
    write_row(warp, lane, rows_of(warp.threads[lane]).row, word[lane / 8][lane % 8], site);
  }
}

void meet(Collective what, const void* operands, Site site) {
  warp_collective(what, kWholeWarp, reinterpret_cast<uint64_t>(operands), 0, 32, site);
}

}  // namespace

void complete_matrix_collective(Warp& warp, Collective what, Site site) {
  if (what > Collective::kStmatrix) {
    multiply(warp, what);
    ++machine.counters.mma;
    return;
  }
  if (what == Collective::kStmatrix) {
    store_matrices(warp, site);
  } else {
    load_matrices(warp, what == Collective::kLdmatrixTrans, site);
  }
  count_wavefronts(warp);
  ++machine.counters.ldmatrix;
}

void ldmatrix_x4(unsigned int* r, const void* smem_ptr, bool transposed, Site site) {
  const Thread& thread = running();
  check_arch(thread, 750, "ldmatrix", site);
  const RowOperands operands = {const_cast<void*>(smem_ptr), r};
  meet(transposed ? Collective::kLdmatrixTrans : Collective::kLdmatrix, &operands, site);
}

void stmatrix_x4(void* smem_ptr, const unsigned int* r, Site site) {
  const Thread& thread = running();
  check_arch(thread, 900, "stmatrix", site);
  const RowOperands operands = {smem_ptr, const_cast<unsigned int*>(r)};
  meet(Collective::kStmatrix, &operands, site);
}

void mma(Collective what, float* d, const unsigned int* a, unsigned int b0, unsigned int b1, Site site) {
  const Thread& thread = running();
  check_arch(thread, 800, "mma", site);
  const MmaOperands operands = {d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  meet(what, &operands, site);
}

void mma_f64(double* d, double a, double b, Site site) {
  const Thread& thread = running();
  check_arch(thread, 800, "mma", site);
  MmaOperands operands = {d, {}, {}};
  memcpy(operands.a, &a, sizeof a);
  memcpy(operands.b, &b, sizeof b);
  meet(Collective::kMmaDouble, &operands, site);
}

}  // namespace emu
