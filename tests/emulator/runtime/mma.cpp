// d += a * b of a warp.
#include "matrix.hpp"

namespace emu {

namespace {

// A (16 x kDepth), B (kDepth x 8) and the accumulator (16 x 8) of float64.
template <int kDepth>
struct Tiles {
  double a[16][kDepth];
  alignas(16) Pair b[kDepth][4];

  // Adds their product to the accumulators of the warp.
  void multiply(const Warp& warp) const {
    for (int g = 0; g < 16; ++g) {
      Pair sum[4];
      for (int t = 0; t < 4; ++t) {
        const float* d = static_cast<const float*>(mma_operands(warp.threads[g % 8 * 4 + t]).d) + g / 8 * 2;
        sum[t] = Pair{d[0], d[1]};
      }
      for (int k = 0; k < kDepth; ++k) {
        const Pair factor = {a[g][k], a[g][k]};
        for (int t = 0; t < 4; ++t) sum[t] += factor * b[k][t];
      }
      for (int t = 0; t < 4; ++t) {
        float* d = static_cast<float*>(mma_operands(warp.threads[g % 8 * 4 + t]).d) + g / 8 * 2;
        d[0] = truncate(sum[t][0]);
        d[1] = truncate(sum[t][1]);
      }
    }
  }

  void set_b(int k, int n, double value) { b[k][n / 2][n % 2] = value; }
};

template <bool kHalf>
void multiply_16(const Warp& warp) {
  Tiles<16> tiles;
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const MmaOperands& operands = mma_operands(warp.threads[lane]);
    Words a, b = {operands.b[0], operands.b[1]};
    memcpy(&a, operands.a, sizeof a);
    const Floats a_element[2] = {expand<kHalf>(a << 16), expand<kHalf>(a & 0xffff0000)};
    const Floats b_element = expand<kHalf>(Words{b[0] << 16, b[0] & 0xffff0000, b[1] << 16, b[1] & 0xffff0000});
    for (int e = 0; e < 2; ++e) {
      for (int j = 0; j < 4; ++j) tiles.a[g + 8 * (j % 2)][2 * t + e + 8 * (j / 2)] = a_element[e][j];
      for (int j = 0; j < 2; ++j) tiles.set_b(2 * t + e + 8 * j, g, b_element[2 * j + e]);
    }
  }
  tiles.multiply(warp);
}

void multiply_tf32(const Warp& warp) {
  Tiles<8> tiles;
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const MmaOperands& operands = mma_operands(warp.threads[lane]);
    for (int j = 0; j < 4; ++j) tiles.a[g + 8 * (j % 2)][t + 4 * (j / 2)] = as_float(operands.a[j] & 0xffffe000);
    for (int j = 0; j < 2; ++j) tiles.set_b(t + 4 * j, g, as_float(operands.b[j] & 0xffffe000));
  }
  tiles.multiply(warp);
}

// One fma after another, each rounded to nearest.
void multiply_f64(const Warp& warp) {
  double a[8][4], b[4][8];
  for (int lane = 0; lane < 32; ++lane) {
    memcpy(&a[lane / 4][lane % 4], mma_operands(warp.threads[lane]).a, sizeof(double));
    memcpy(&b[lane % 4][lane / 4], mma_operands(warp.threads[lane]).b, sizeof(double));
  }
  for (int lane = 0; lane < 32; ++lane) {
    double* d = static_cast<double*>(mma_operands(warp.threads[lane]).d);
    for (int i = 0; i < 2; ++i) {
      for (int k = 0; k < 4; ++k) d[i] = std::fma(a[lane / 4][k], b[k][lane % 4 * 2 + i], d[i]);
    }
  }
}

}  // namespace

void multiply(const Warp& warp, Collective what) {
  if (what == Collective::kMmaDouble) {
    multiply_f64(warp);
  } else if (what == Collective::kMmaTf32) {
    multiply_tf32(warp);
  } else if (what == Collective::kMmaHalf) {
    multiply_16<true>(warp);
  } else {
    multiply_16<false>(warp);
  }
}

}  // namespace emu
