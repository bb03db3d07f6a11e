// Where wgmma finds its operands in shared memory, and how it multiplies them.
#include "wgmma_operand.hpp"

#include "matrix.hpp"

namespace emu {

void check_async_row(Warp& warp, uint32_t offset, Site site);
void add_reading(const Thread& thread, uint32_t offset, uint32_t reading);

// -- descriptors --------------------------------------------------------------------------------------

namespace {

uint32_t swizzle(uint32_t address, uint32_t span) { return address ^ (address >> 7 & (span / 16 - 1)) << 4; }

// Calls visit(offset) for each chunk, in order of lines.
template <class Visit>
void for_each_chunk(const SharedOperand& operand, Visit visit) {
  const uint32_t chunks_of_span = operand.span / 16;
  for (int i = operand.first_line; i < operand.first_line + operand.lines; ++i) {
    const uint32_t line = operand.start + i / 8 * operand.stride + i % 8 * operand.span;
    for (int c = operand.first_chunk; c < operand.first_chunk + operand.chunks; ++c) {
      const uint32_t panel = operand.mn_major ? c / chunks_of_span : 0, inside = c - panel * chunks_of_span;
      visit(swizzle(line + panel * operand.leading + inside * 16, operand.span) - kSharedBase);
    }
  }
}

}  // namespace

unsigned int wgmma_descriptor(const void* smem_ptr, unsigned int pitch, Site site) {
  Thread& thread = running();
  check_sm_90a(thread, "wgmma_descriptor", site);
  const uint32_t address = smem_offset(thread, smem_ptr, 16, site) + kSharedBase;
  if (pitch % 16 != 0 || pitch >> 18 != 0) {
    fault(thread, site, "wgmma_descriptor of a pitch of %u bytes: it must be a multiple of 16 below 2^18", pitch);
  }
  return address >> 4 | pitch / 16 << 16;
}

void decode(const Thread& thread, const char* name, uint32_t lower, uint32_t upper, SharedOperand& operand, Site site) {
  const uint64_t descriptor = uint64_t(upper) << 32 | lower;
  constexpr uint64_t kReserved = 0x3ff0'0000'0000'0000 | 0x1c000'0000'0000 | 0xc000'c000;
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const auto check = [&](bool right, const char* wrong) {
    if (right) return;
    fault(thread, site, "the descriptor of %s, 0x%016llx, %s", name, static_cast<unsigned long long>(descriptor),
          wrong);
  };
  check((descriptor & kReserved) == 0, "sets bits that must be 0");
  check((descriptor >> 49 & 7) == 0, "has a base offset, which the emulator does not know");
  check(descriptor >> 62 != 0, "is without a swizzle, which the emulator does not know");
  operand.span = 256 >> (descriptor >> 62);
  operand.start = field(0);
  operand.leading = field(16);
  operand.stride = field(32);
  const uint32_t inside = operand.start % operand.span, pattern = 8 * operand.span;
  check((operand.start - inside) % pattern == 0, "starts amid a swizzle pattern of eight rows");
  check(operand.mn_major ? inside == 0 : inside % 32 == 0, "starts amid the columns of a step");
  check(operand.stride % pattern == 0, "has a stride amid a swizzle pattern");
  check(machine.dynamic_alignment % static_cast<int>(pattern) == 0,
        "takes an address of a multiple of the swizzle pattern's bytes, but dynamic_smem was asked for less");
  const bool panels = operand.mn_major && (operand.first_chunk + operand.chunks) * 16 > static_cast<int>(operand.span);
  check(!panels || operand.leading % pattern == 0, "has a pitch of panels amid a swizzle pattern");
}

void begin_reading(Warp& warp, const SharedOperand& operand, uint32_t reading, Site site) {
  const Thread& thread = warp.threads[0];
  for_each_chunk(operand, [&](uint32_t offset) {
    if (offset + 16 > machine.launch.dynamic_smem) {
      fault(thread, site, "wgmma reads 16 bytes of shared memory out of bounds: offset %d; there are %llu bytes",
            static_cast<int32_t>(offset), static_cast<unsigned long long>(machine.launch.dynamic_smem));
    }
    check_async_row(warp, offset, site);
    add_reading(thread, offset, reading);
  });
}

void copy(const Block& block, const SharedOperand& operand, uint8_t* out) {
  for_each_chunk(operand, [&](uint32_t offset) {
    memcpy(out, block.arena_start + offset, 16);
    out += 16;
  });
}

// -- product ------------------------------------------------------------------------------------------

namespace {

// Eight columns of b.
using Strip = Pair[16][4];

template <bool kHalf>
void expand_words(const void* words, double (&low)[4], double (&high)[4]) {
  Words w;
  memcpy(&w, words, sizeof w);
  const Floats l = expand<kHalf>(w << 16), h = expand<kHalf>(w & 0xffff0000);
  for (int i = 0; i < 4; ++i) low[i] = l[i], high[i] = h[i];
}

void expand_words(bool half, const void* words, double (&low)[4], double (&high)[4]) {
  half ? expand_words<true>(words, low, high) : expand_words<false>(words, low, high);
}

// Columns 8 n to 8 n + 7 of b, whose chunks are at `bytes`.
void expand_strip(bool half, const SharedOperand& b, const uint8_t* bytes, int n, Strip& out) {
  double low[4], high[4];
  for (int i = 0; i < 16; ++i) {
    const int chunk = b.mn_major ? i * b.chunks + n : 16 * n + i;
    expand_words(half, bytes + 16 * chunk, low, high);
    for (int j = 0; j < 4; ++j) {
      if (b.mn_major) {
        out[i][j] = Pair{low[j], high[j]};
      } else {
        const int k = i % 2 * 8 + 2 * j, column = i / 2;
        out[k][column / 2][column % 2] = low[j];
        out[k + 1][column / 2][column % 2] = high[j];
      }
    }
  }
}

// d: the accumulators of the strip of lane 0; those of the next lane are `pitch` further.
void multiply_strip(const double (&a)[16][16], const Strip& b, float* d, int pitch) {
  for (int row = 0; row < 16; ++row) {
    float* lanes = d + row % 8 * 4 * pitch + row / 8 * 2;
    const auto load = [&](int t) { return Pair{lanes[t * pitch], lanes[t * pitch + 1]}; };
    Pair first = load(0), second = load(1), third = load(2), fourth = load(3);  // an array would not be in registers
    for (int k = 0; k < 16; ++k) {
      const Pair factor = {a[row][k], a[row][k]};
      first += factor * b[k][0];
      second += factor * b[k][1];
      third += factor * b[k][2];
      fourth += factor * b[k][3];
    }
    const Pair sum[4] = {first, second, third, fourth};
    for (int t = 0; t < 4; ++t) {
      for (int i = 0; i < 2; ++i) lanes[t * pitch + i] = truncate(sum[t][i]);
    }
  }
}

}  // namespace

void multiply(bool half, const uint8_t* a_rows, const SharedOperand& b, const uint8_t* b_bytes, float* d) {
  double a[16][16], low[4], high[4];
  for (int chunk = 0; chunk < 32; ++chunk) {
    expand_words(half, a_rows + 16 * chunk, low, high);
    for (int j = 0; j < 4; ++j) {
      a[chunk / 2][chunk % 2 * 8 + 2 * j] = low[j];
      a[chunk / 2][chunk % 2 * 8 + 2 * j + 1] = high[j];
    }
  }
  const int columns = b.mn_major ? b.chunks * 8 : b.lines;
  Strip strip;
  for (int n = 0; n < columns / 8; ++n) {
    expand_strip(half, b, b_bytes, n, strip);
    multiply_strip(a, strip, d + 4 * n, columns / 2);
  }
}

}  // namespace emu
