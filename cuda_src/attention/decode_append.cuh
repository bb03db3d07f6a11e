// New keys and values of a call -> the cache. Nobody reads these rows of it during the launch: loads take them from
// where they come from.
#pragma once

#include <attention/key_cursor.cuh>

// All new rows, a warp each, by all warps of the grid.
template <int kWarps, class T>
__device__ __forceinline__ void append_rows(const DecodeParams& p) {
  const long long rows = static_cast<long long>(p.batch) * p.kv_heads * p.new_rows;
  const long long warps = static_cast<long long>(gridDim.x) * kWarps;
#pragma unroll 1
  for (long long i = static_cast<long long>(blockIdx.x) * kWarps + threadIdx.x / 32; i < rows; i += warps) {
    const long long row = i % p.new_rows, head = i / p.new_rows % p.kv_heads, b = i / p.new_rows / p.kv_heads;
    const Lengths lengths(p, static_cast<int>(b));
    const int key = lengths.old + static_cast<int>(row);
    if (key >= lengths.kv_len) continue;  // it does not count, or there is no room
    const KeyPlace place(p, static_cast<int>(b), table_row(p, static_cast<int>(b)), key, true);
    if (place.page < 0) continue;
    const auto copy = [&](void* cache, const long long (&stride)[4], const void* fresh,
                          const long long (&new_stride)[4], int columns) {
      T* to = static_cast<T*>(cache) + place.page * stride[0] + head * stride[1] + place.row * stride[2];
      const T* from = static_cast<const T*>(fresh) + b * new_stride[0] + head * new_stride[1] + row * new_stride[2];
      copy_row(to, stride[3], from, new_stride[3], columns, static_cast<int>(threadIdx.x) % 32, 32, p.new_is_vector);
    };
    copy(p.k, p.k_stride, p.k_new, p.k_new_stride, p.head_dim);
    if (p.v_new != nullptr) copy(p.v, p.v_stride, p.v_new, p.v_new_stride, p.value_dim);
  }
}
