// Gumbel noise -log(-log(u)), u uniform: the element with the largest sum of score and noise is a draw from the softmax
// of the scores, and the next ones are those of draws without replacement (Kool, van Hoof & Welling, arXiv:1903.06059).
//
// The noise of an element is a function of seed, offset, row and index alone, and made of float32 products and sums
// that are rounded one by one: it has the same bits wherever it is computed.
#pragma once

#include <primitives/numeric.cuh>
#include <primitives/philox.cuh>

// c0 + c1 x + ..., every product and every sum rounded.
__device__ __forceinline__ float polynomial(float, float c0) { return c0; }
template <class... More>
__device__ __forceinline__ float polynomial(float x, float c0, More... c) {
  return mul_rn(polynomial(x, c...), x) + c0;
}

// -log(E), E = -log(1 - (word + 1/2) / 2^32), with an error below 3e-6: 22.9 of word 0, and less as it rises.
__device__ __forceinline__ float gumbel(unsigned int word) {
  constexpr float kLog2 = 0.6931472f;
  // E: each one that the word begins with halves 1 - u, and 1 - v / 2 is left.
  const int ones = __clz(static_cast<int>(~word | 1));
  const float v = mul_rn(static_cast<float>(word << ones << 1 | 1u << ones), 0x1p-32f);
  const float rest = polynomial(v, 0.49999994f, 0.12500913f, 0.04148284f, 0.017015588f, 0.0011882656f, 0.012272065f,
                                -0.008449318f, 0.0046285773f);
  const float exponential = mul_rn(rest, v) + mul_rn(static_cast<float>(ones), kLog2);
  // Its logarithm: E = 2^exponent (1 + x), 1 + x from the square root of 1/2 to that of 2.
  const int bits = __float_as_int(exponential), exponent = (bits - 0x3f3504f3) >> 23;
  const float x = __int_as_float(bits - exponent * 0x800000) - 1;
  const float log1p = polynomial(x, 1.0f, -0.49999988f, 0.33334187f, -0.25002074f, 0.19956833f, -0.16562402f,
                                 0.14952284f, -0.14366786f, 0.0872224f);
  return -(mul_rn(log1p, x) + mul_rn(static_cast<float>(exponent), kLog2));
}

// The words whose noise may reach `least` begin with 0 and end with the word returned, or with the one before; there is
// none where `any` becomes false. NaN: all may.
__device__ __forceinline__ unsigned int last_word_to_reach(float least, bool& any) {
  // E = word / 2^32 at least, so that the noise is at most -log(word / 2^32): word <= 2^y.
  const float y = fminf(32 - (least - 1e-5f) * 1.442695f, 32);  // NaN becomes 32
  any = y > -1.01f;                                             // the noise of 0 is that of 1/2
  // 2^y is at most 2^floor(y) (1 + y - floor(y)), a number whose bits are linear in y.
  const float power = __int_as_float(static_cast<int>((fmaxf(y, -2) + 127.001f) * 0x1p23f));
  return power < 0x1p32f ? static_cast<unsigned int>(power) + 1 : 0xffffffff;
}

// What a row's noise is drawn by: element i has word i % 4 of counter i / 4.
struct GumbelNoise {
  uint2 seed;
  unsigned int row;  // the low half of its number; the high half is in the offset
  uint2 offset;

  __device__ __forceinline__ GumbelNoise(unsigned long long seed, unsigned long long offset, unsigned long long row)
      : seed{static_cast<unsigned int>(seed), static_cast<unsigned int>(seed >> 32)},
        row(static_cast<unsigned int>(row)),
        offset{static_cast<unsigned int>(offset), static_cast<unsigned int>((offset ^ row) >> 32)} {}

  // Words of elements i ... i + kCount - 1; i may be negative, its words mean nothing.
  template <int kCount>
  __device__ __forceinline__ void draw(unsigned int (&word)[kCount], long long i) const {
    constexpr int kCounters = (kCount + 6) / 4;  // wherever i is
    const unsigned int counter = static_cast<unsigned int>(i >> 2), first = static_cast<unsigned int>(i) % 4;
    unsigned int all[4 * kCounters];
#pragma unroll
    for (int c = 0; c < kCounters; ++c) {
      uint4 four = {};
      if (4 * c < first + kCount) four = philox4x32_10({counter + c, row, offset.x, offset.y}, seed);
      all[4 * c] = four.x, all[4 * c + 1] = four.y, all[4 * c + 2] = four.z, all[4 * c + 3] = four.w;
    }
    // From word `first` on: registers cannot be indexed at run time.
    unsigned int even[kCount + 1];
#pragma unroll
    for (int j = 0; j <= kCount; ++j) even[j] = first & 2 ? all[j + 2] : all[j];
#pragma unroll
    for (int j = 0; j < kCount; ++j) word[j] = first & 1 ? even[j + 1] : even[j];
  }

  __device__ __forceinline__ float of(long long i) const {
    unsigned int word[1];
    draw(word, i);
    return gumbel(word[0]);
  }
};
