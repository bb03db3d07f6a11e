// What the kernels of Hopper for attention_backward do with the accumulators of wgmma.
#pragma once

#include <attention/backward.cuh>
#include <attention/products_sm90.cuh>

// d = `value` where column c of the lane's row is not one of low[half] … high[half] - 1; column0 is that of d[0].
template <int kCount>
__device__ __forceinline__ void hide(float (&d)[kCount], float value, const int (&low)[2], const int (&high)[2],
                                     int column0) {
#pragma unroll
  for (int r = 0; r < kCount; ++r) {
    const int column = column0 + 8 * (r / 4) + r % 2;
    if (column < low[r / 2 % 2] || column >= high[r / 2 % 2]) d[r] = value;
  }
}

// Images of dS (ScoreGradients), as threads with accumulators of dS^T can store them: thread t of a quad has eight of
// the queries 32 c … 32 c + 31 of a key, and these are chunk 4 c + t of the key's row.
constexpr int kImageRows = 64, kImageBytes = 64 * kImageRows * 2;

// The query that is row `row` of an image that has been turned.
__device__ __forceinline__ int query_of_image(int row) {
  return row / 32 * 32 + row % 8 / 2 * 8 + row / 8 % 4 * 2 + row % 2;
}

// Row of the images as a matrix of 64 columns where those of a head, of the keys from `key` and the first queries,
// begin; those of the next 64 queries follow.
__device__ __forceinline__ long long image_row(const ScoreGradients& ds, long long head, int key) {
  return (head * ds.k_tiles + key / 64) * ds.q_tiles * kImageRows;
}

// P of scores, s = probability<false>(s, fold, lse) of the lane's rows. That one exceeds 1 is rare: a warp limits its
// own only then, and else looks at the signs of the exponents, two an instruction.
template <int kCount>
__device__ __forceinline__ void probabilities(float (&s)[kCount], float fold, const float (&lse)[2]) {
  int signs = -1;
#pragma unroll
  for (int r = 0; r < kCount; ++r) {
    const float x = ::fma(s[r], fold, -lse[r / 2 % 2]);
    signs &= __float_as_int(x);
    s[r] = ScoreBase<float>::exp(x);
  }
  if (!__any_sync(0xffffffff, signs >= 0)) return;
#pragma unroll
  for (int r = 0; r < kCount; ++r) s[r] = s[r] > 1 ? 1.0f : s[r];  // NaN stays
}

// What a warpgroup's accumulators go through to global memory, 64 columns at a time; rows are the warp's own.
template <class T>
using Staging = Panels<T, 64, 64>;

// 64 rows from the accumulators of wgmma to global memory: `good` rows times `factor`, zeros up to `rows`. kImage: they
// are products of an image of dS.
template <bool kImage = false, int kCount, class T>
__device__ __forceinline__ void store_accumulators(const float (&d)[kCount], float factor, Staging<T> staging, int good,
                                                   int rows, T* out, const long long (&stride)[4], int columns,
                                                   bool vector) {
  constexpr int kCols = 2 * kCount;
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4, lane = static_cast<int>(threadIdx.x) % 32;
  const int row0 = 16 * warp + lane / 4;
  const auto place = [](int row) { return kImage ? query_of_image(row) : row; };
#pragma unroll
  for (int first = 0; first < kCols; first += 64) {
    __syncwarp();  // every lane has read what was here
#pragma unroll
    for (int i = first / 16; i < min(kCols, first + 64) / 16; ++i) {
      unsigned int words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float pair[2] = {d[8 * i + 2 * j] * factor, d[8 * i + 2 * j + 1] * factor};
        const bool there = place(row0 + 8 * (j % 2)) < good;
        words[j] = ptx::cvt_rn_x2<T>(there ? pair[0] : 0, there ? pair[1] : 0);
      }
      ptx::stmatrix_x4(staging.chunk(16 * warp + lane % 16, 2 * i - first / 8 + lane / 16), words);
    }
    __syncwarp();                                   // the rows of this warp are whole
    const int chunks = min(kCols - first, 64) / 8;  // of a row
    for (int i = lane; i < 16 * chunks; i += 32) {
      const int at = 16 * warp + i / chunks, row = place(at), column = first + i % chunks * 8;
      const int left = row < rows ? columns - column : 0;
      if (left <= 0) continue;
      using Chunk = Fragment<T, 8>;
      const Chunk values = ptx::ld_shared(reinterpret_cast<const Chunk*>(staging.chunk(at, i % chunks)));
      store_left(out + row * stride[2] + column * stride[3], values, left, stride[3], vector);
    }
  }
}
