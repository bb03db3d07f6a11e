// A tile of kRows x kCols elements in shared memory, moved in chunks of 16 bytes.
//
// Chunk c of row r lies at chunk c ^ swizzle(r) of its row, so that equal chunks of 8 neighbouring rows, which ldmatrix
// reads at once, lie in 8 different groups of 4 banks, whatever the length of a row: g = gcd(chunks per row, 8) chunks
// repeat every 8 / g rows, and within these the row length itself spreads them.
#pragma once

#include <primitives/vector.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/ldmatrix.cuh>

template <class T, int kRows, int kCols>
struct Tile {
  static constexpr int kPerChunk = 16 / sizeof(T);
  static constexpr int kChunks = kCols / kPerChunk;  // per row
  static constexpr int kRepeat = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;
  static constexpr int kRowPitch = kCols, kRepeatPitch = kRepeat * kPerChunk;  // elements: a row, kRepeat chunks on
  static_assert(kCols % kPerChunk == 0, "rows are whole chunks");
  using Element = T;
  using Chunk = Fragment<T, kPerChunk>;

  T* base;

  // Only the low part of a column is swizzled, so that addresses of unrolled accesses differ by constants.
  __device__ __forceinline__ T* chunk(unsigned int row, unsigned int column) const {
    const unsigned int low = column % kRepeat ^ row / (8 / kRepeat) % kRepeat;
    return base + (row * kChunks + column / kRepeat * kRepeat + low) * kPerChunk;
  }
  // Chunks of a lane: `rows`, a multiple of 8, and `columns`, an even number, from its own, whose column is 0 or 1.
  // Eight rows on, the swizzle is the same, and so they differ from it by constants: by an exclusive or, since the tile
  // begins at a multiple of 128 bytes, and by a sum.
  struct Lane {
    ptx::SharedAddress own;
    __device__ __forceinline__ ptx::SharedAddress chunk(unsigned int rows, unsigned int columns) const {
      return own.offset(columns % kRepeat * 16, (rows * kChunks + columns / kRepeat * kRepeat) * 16);
    }
  };
  __device__ __forceinline__ Lane lane(unsigned int row, unsigned int column) const { return {chunk(row, column)}; }
  __device__ __forceinline__ T* at(unsigned int row, unsigned int col) const {
    return chunk(row, col / kPerChunk) + col % kPerChunk;
  }

  // Rows `begin` to `end` of `cols` elements from global memory, zeros around them. kVector: asynchronously, where
  // every chunk is aligned and `cols` are whole chunks; else element by element, at any strides. The caller commits,
  // waits and synchronises.
  template <bool kVector, int kThreads>
  __device__ __forceinline__ void load(const T* rows, long long row_stride, long long col_stride, int begin, int end,
                                       int cols) const {
    constexpr int kStep = kThreads / kRepeat;  // rows at a time, of kRepeat chunks each
    const int first_row = static_cast<int>(threadIdx.x) / kRepeat,
              first_column = static_cast<int>(threadIdx.x) % kRepeat;
    const T* ptr = rows + first_row * row_stride + first_column * kPerChunk * col_stride;
#pragma unroll(kVector ? kRows : 1)
    for (int i = 0; i < kRows; i += kStep, ptr += kStep * row_stride) {
      const int row = first_row + i;
      if (kRows % kStep != 0 && row >= kRows) break;
#pragma unroll(kVector ? kChunks : 2)
      for (int column = 0; column < kChunks; column += kRepeat) {
        T* to = chunk(row, first_column) + column * kPerChunk;
        const bool inside = row >= begin && row < end;
        const int left = inside ? cols - (first_column + column) * kPerChunk : 0;  // elements from here on
        if constexpr (kVector) {
          ptx::cp_async_16(to, ptr + column * kPerChunk, left > 0 ? 16 : 0);
        } else {
          Chunk values;
#pragma unroll
          for (int e = 0; e < kPerChunk; ++e) {
            values.element[e] = e < left ? ptx::ld_global(ptr + (column * kPerChunk + e) * col_stride) : T();
          }
          ptx::st_shared(reinterpret_cast<Chunk*>(to), values);
        }
      }
    }
  }
};
