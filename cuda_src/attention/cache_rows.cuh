// What all kernels that read or write a KV cache share: integers as the caller has them, and a row that moves.
#pragma once

#include <primitives/vector.cuh>

// Element `element` of an array of long long, if `wide`, or int: lengths and page numbers.
__device__ __forceinline__ long long ld_integer(const void* array, long long element, bool wide) {
  if (wide) return ptx::ld_global(static_cast<const long long*>(array) + element);
  return ptx::ld_global(static_cast<const int*>(array) + element);
}

// One row, by `lanes` threads of which this is `lane`. vector: both rows are whole aligned chunks of 16 bytes.
template <class T>
__device__ __forceinline__ void copy_row(T* to, long long to_stride, const T* from, long long from_stride, int columns,
                                         int lane, int lanes, bool vector) {
  constexpr int kChunk = 16 / sizeof(T);
  using Chunk = Fragment<T, kChunk>;
  if (vector) {
#pragma unroll 1
    for (int column = lane * kChunk; column < columns; column += lanes * kChunk) {
      const Chunk chunk = ptx::ld_global(reinterpret_cast<const Chunk*>(from + column));
      ptx::st_global(reinterpret_cast<Chunk*>(to + column), chunk);
    }
  } else {
#pragma unroll 1
    for (int column = lane; column < columns; column += lanes) {
      ptx::st_global(to + column * to_stride, ptx::ld_global(from + column * from_stride));
    }
  }
}
