// mma.sync: d = a * b + c of a warp. PTX ISA, "Warp-level Matrix Instructions: mma", whose figures say which lane holds
// which elements: with g = lane / 4 and t = lane % 4.
#include "alu/fastest.hpp"
#include "execution/counters.hpp"
#include "execution/handlers.hpp"
#include "matrix/numbers.hpp"

namespace soft {

namespace {

// a (16 x kDepth), b (kDepth x 8), c and d (16 x 8) of float32.
template <int kDepth>
struct Tiles {
  double a[16][kDepth];
  Quad b[kDepth][2];

  void set_b(int k, int n, double value) { b[k][n / 4][n % 4] = value; }

  void multiply(Warp& warp, const Inst& inst) const {
    for (int row = 0; row < 16; ++row) {
      const int lane = row % 8 * 4, first = row / 8 * 2;
      const float *left = R<float>(warp, inst.y[4 + first]) + lane, *right = R<float>(warp, inst.y[5 + first]) + lane;
      Quad low = {left[0], right[0], left[1], right[1]}, high = {left[2], right[2], left[3], right[3]};
      for (int k = 0; k < kDepth; ++k) {
        const double factor = a[row][k];
        low += factor * b[k][0];
        high += factor * b[k][1];
      }
      float *left_sum = R<float>(warp, inst.x[4 + first]) + lane, *right_sum = R<float>(warp, inst.x[5 + first]) + lane;
      for (int t = 0; t < 4; ++t) {
        const Quad& sum = t < 2 ? low : high;
        left_sum[t] = truncate(sum[t % 2 * 2]);
        right_sum[t] = truncate(sum[t % 2 * 2 + 1]);
      }
    }
    ++counters().mma;
  }
};

// m16n8k16 and m16n8k8 of float16 and bfloat16: registers of two elements.
template <int kDepth, bool kBfloat>
void multiply_16_bit(Warp& warp, const Inst& inst) {
  Tiles<kDepth> tiles;
  constexpr int kHalves = kDepth / 8;
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    Words a = {}, b = {};
    for (int j = 0; j < 2 * kHalves; ++j) a[j] = R<u32>(warp, inst.x[j])[lane];
    for (int j = 0; j < kHalves; ++j) b[j] = R<u32>(warp, inst.y[j])[lane];
    const Floats a_element[2] = {expand<kBfloat>(a << 16), expand<kBfloat>(a & 0xffff0000)};
    const Floats b_element[2] = {expand<kBfloat>(b << 16), expand<kBfloat>(b & 0xffff0000)};
    for (int e = 0; e < 2; ++e) {
      for (int j = 0; j < 2 * kHalves; ++j) tiles.a[g + 8 * (j % 2)][2 * t + e + 8 * (j / 2)] = a_element[e][j];
      for (int j = 0; j < kHalves; ++j) tiles.set_b(2 * t + e + 8 * j, g, b_element[e][j]);
    }
  }
  tiles.multiply(warp, inst);
}

// m16n8k8 of tf32, whose lower 13 bits do not count.
void multiply_tf32(Warp& warp, const Inst& inst) {
  Tiles<8> tiles;
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const auto element = [&](u32 offset) { return as_float(R<u32>(warp, offset)[lane] & 0xffffe000); };
    for (int j = 0; j < 4; ++j) tiles.a[g + 8 * (j % 2)][t + 4 * (j / 2)] = element(inst.x[j]);
    for (int j = 0; j < 2; ++j) tiles.set_b(t + 4 * j, g, element(inst.y[j]));
  }
  tiles.multiply(warp, inst);
}

// m8n8k4: one fma after another, each rounded to nearest.
void multiply_f64(Warp& warp, const Inst& inst) {
  double a[8][4], b[4][8], result[32][2];
  for (int lane = 0; lane < 32; ++lane) {
    a[lane / 4][lane % 4] = R<double>(warp, inst.x[0])[lane];
    b[lane % 4][lane / 4] = R<double>(warp, inst.y[0])[lane];
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 2; ++i) {
      double sum = R<double>(warp, inst.y[4 + i])[lane];
      for (int k = 0; k < 4; ++k) sum = std::fma(a[lane / 4][k], b[k][lane % 4 * 2 + i], sum);
      result[lane][i] = sum;
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 2; ++i) R<double>(warp, inst.x[4 + i])[lane] = result[lane][i];
  }
  ++counters().mma;
}

}  // namespace

Handler mma_handler(const std::string& shape, const std::string& type) {
  const bool is_bfloat = type == "bf16", is_16_bit = is_bfloat || type == "f16";
  if (shape == "m16n8k16" && is_16_bit) {
    return is_bfloat ? fastest<multiply_16_bit<16, true>>() : fastest<multiply_16_bit<16, false>>();
  }
  if (shape == "m16n8k8" && is_16_bit) {
    return is_bfloat ? fastest<multiply_16_bit<8, true>>() : fastest<multiply_16_bit<8, false>>();
  }
  if (shape == "m16n8k8" && type == "tf32") return fastest<multiply_tf32>();
  return shape == "m8n8k4" && type == "f64" ? fastest<multiply_f64>() : nullptr;
}

}  // namespace soft
