// Where wgmma finds its operands in shared memory, and how it multiplies them. PTX ISA, "wgmma: Matrix Descriptor",
// "Strides", "Core matrices and swizzling modes".
#include "alu/fastest.hpp"
#include "matrix/numbers.hpp"
#include "matrix/wgmma.hpp"
#include "memory/shadow.hpp"

namespace soft {

namespace {

u32 swizzle(u32 address, u32 span) { return address ^ (address >> 7 & (span / 16 - 1)) << 4; }

// Calls visit(offset) for each chunk, in order of lines.
template <class Visit>
void for_each_chunk(const SharedOperand& operand, Visit visit) {
  const u32 chunks_of_span = operand.span / 16;
  for (int i = operand.first_line; i < operand.first_line + operand.lines; ++i) {
    const u32 number = static_cast<u32>(i);
    const u32 line = operand.start + number / 8 * operand.stride + number % 8 * operand.span;
    const u32 first = static_cast<u32>(operand.first_chunk);
    for (u32 c = first; c < first + static_cast<u32>(operand.chunks); ++c) {
      const u32 panel = operand.mn_major ? c / chunks_of_span : 0, inside = c - panel * chunks_of_span;
      visit(swizzle(line + panel * operand.leading + inside * 16, operand.span));
    }
  }
}

}  // namespace

void decode(const Warp& warp, const Inst& inst, const char* name, u64 descriptor, SharedOperand& operand) {
  constexpr u64 kReserved = 0x3ff0'0000'0000'0000 | 0x1c000'0000'0000 | 0xc000'c000;
  const auto field = [&](int bit) { return static_cast<u32>(descriptor >> bit & 0x3fff) << 4; };
  const auto check = [&](bool right, const char* wrong) {
    if (right) return;
    fault(warp, inst, 0, "the descriptor of %s, 0x%016llx, %s", name, static_cast<unsigned long long>(descriptor),
          wrong);
  };
  check((descriptor & kReserved) == 0, "sets bits that must be 0");
  check((descriptor >> 49 & 7) == 0, "has a base offset, which the software device does not know");
  check(descriptor >> 62 != 0, "is without a swizzle, which the software device does not know");
  operand.span = 256u >> (descriptor >> 62);
  operand.start = field(0);
  operand.leading = field(16);
  operand.stride = field(32);
  const u32 inside = operand.start % operand.span, pattern = 8 * operand.span;
  check((operand.start - inside) % pattern == 0, "starts amid a swizzle pattern of eight rows");
  check(operand.mn_major ? inside == 0 : inside % 32 == 0, "starts amid the columns of a step");
  check(operand.stride % pattern == 0, "has a stride amid a swizzle pattern");
  const bool panels = operand.mn_major && (operand.first_chunk + operand.chunks) * 16 > static_cast<int>(operand.span);
  check(!panels || operand.leading % pattern == 0, "has a pitch of panels amid a swizzle pattern");
}

void check_operand(Warp& warp, const Inst& inst, const SharedOperand& operand) {
  for_each_chunk(operand, [&](u32 offset) {
    if (offset + 16 > warp.block->smem.size()) {
      fault(warp, inst, 0, "wgmma reads 16 bytes of shared memory out of bounds: offset %u; there are %zu bytes",
            offset, warp.block->smem.size());
    }
    check_async_read(warp, inst, 0, *warp.block, offset, 16, "wgmma reads");
  });
}

void record_reading(Warp& warp, const SharedOperand& operand) {
  for_each_chunk(operand, [&](u32 offset) { record_async_read(warp, *warp.block, offset, 16); });
}

void copy_operand(const Block& block, const SharedOperand& operand, char* out) {
  for_each_chunk(operand, [&](u32 offset) {
    memcpy(out, block.smem.data() + offset, 16);
    out += 16;
  });
}

// -- product ------------------------------------------------------------------------------------------

namespace {

// Eight columns of b.
using Strip = Quad[16][2];

template <bool kBfloat>
void expand_chunk(const char* bytes, double* out) {
  Words words;
  memcpy(&words, bytes, sizeof words);
  const Floats low = expand<kBfloat>(words << 16), high = expand<kBfloat>(words & 0xffff0000);
  for (int i = 0; i < 4; ++i) out[2 * i] = low[i], out[2 * i + 1] = high[i];
}

void expand_chunk(bool is_bfloat, const char* bytes, double* out) {
  is_bfloat ? expand_chunk<true>(bytes, out) : expand_chunk<false>(bytes, out);
}

// Columns 8 n to 8 n + 7 of b, whose chunks are at `bytes`.
void expand_strip(bool is_bfloat, const SharedOperand& b, const char* bytes, int n, Strip& out) {
  double value[8];
  for (int i = 0; i < 16; ++i) {
    const int chunk = b.mn_major ? i * b.chunks + n : 16 * n + i;
    expand_chunk(is_bfloat, bytes + 16 * chunk, value);
    for (int e = 0; e < 8; ++e) {
      if (b.mn_major) {
        out[i][e / 4][e % 4] = value[e];
      } else {
        out[i % 2 * 8 + e][i / 8][i / 2 % 4] = value[e];
      }
    }
  }
}

// d: the accumulators of the strip of lane 0; those of the next lane are `pitch` further.
void multiply_strip(const double (&a)[16][16], const Strip& b, float* d, int pitch) {
  for (int row = 0; row < 16; ++row) {
    float* lanes = d + row % 8 * 4 * pitch + row / 8 * 2;
    float *second = lanes + pitch, *third = second + pitch, *fourth = third + pitch;
    Quad low = {lanes[0], lanes[1], second[0], second[1]}, high = {third[0], third[1], fourth[0], fourth[1]};
    for (int k = 0; k < 16; ++k) {
      const double factor = a[row][k];
      low += factor * b[k][0];
      high += factor * b[k][1];
    }
    for (int i = 0; i < 2; ++i) {
      lanes[i] = truncate(low[i]);
      second[i] = truncate(low[2 + i]);
      third[i] = truncate(high[i]);
      fourth[i] = truncate(high[2 + i]);
    }
  }
}

void multiply_strips(bool is_bfloat, const char* a_rows, const SharedOperand& b, const char* b_bytes, float* d) {
  double a[16][16];
  for (int chunk = 0; chunk < 32; ++chunk) expand_chunk(is_bfloat, a_rows + 16 * chunk, &a[chunk / 2][chunk % 2 * 8]);
  const int columns = b.mn_major ? b.chunks * 8 : b.lines;
  Strip strip;
  for (int n = 0; n < columns / 8; ++n) {
    expand_strip(is_bfloat, b, b_bytes, n, strip);
    multiply_strip(a, strip, d + 4 * n, columns / 2);
  }
}

}  // namespace

void multiply(bool is_bfloat, const char* a_rows, const SharedOperand& b, const char* b_bytes, float* d) {
  static const auto run = fastest<multiply_strips>();
  run(is_bfloat, a_rows, b, b_bytes, d);
}

}  // namespace soft
