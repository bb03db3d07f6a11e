// New keys and values -> a cache, behind the keys that each sequence has in it.
//
// For each sequence b, new token i and key head; keys in the first `key_blocks` blocks, values in the others:
//   1. a team of `lanes` neighbours in a warp has the row, head after head of a token
//   2. j <- kv_lens[b] + i; nothing is written if i >= new_lens[b], or if there is no room for key j, or no page
//   3. Copied: the bits of the row -> cache
//      Quantized: scale <- max |x| / largest, if rows have scales of their own; x / scale, to nearest even -> cache
//
// A thread moves 16 bytes at a time where rows are whole aligned chunks, else an element.
#pragma once

#include <attention/eight_bits.cuh>
#include <attention/new_rows.cuh>

struct Copied {
  static __device__ __forceinline__ void store(const NewRow& row, const KvAppendParams& p) {
    if (p.new_dtype == kDouble) return copy<unsigned long long>(row);
    if (p.new_dtype == kFloat) return copy<unsigned int>(row);
    copy<unsigned short>(row);
  }

 private:
  template <class T>
  static __device__ __forceinline__ void copy(const NewRow& row) {
    const T* from = static_cast<const T*>(row.from) + row.from_at;
    T* to = static_cast<T*>(row.to) + row.to_at;
    copy_row(to, row.to_stride, from, row.from_stride, row.columns, row.lane, row.lanes, row.vector);
  }
};

// 32 lanes have 768 columns in their registers, which are more than a cache has.
template <class Acc>
struct Quantized {
  static constexpr int kChunks = 3, kWidth = 8;

  static __device__ __forceinline__ void store(const NewRow& row, const KvAppendParams& p) {
    Acc x[kChunks][kWidth] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int column = (c * row.lanes + row.lane) * kWidth;
      if (column >= row.columns) continue;
      if (p.new_dtype == kHalf) load<__half>(x[c], row, column);
      if (p.new_dtype == kBfloat16) load<__nv_bfloat16>(x[c], row, column);
      if (p.new_dtype == kFloat) load<float>(x[c], row, column);
      if constexpr (kIsSame<Acc, double>) {
        if (p.new_dtype == kDouble) load<double>(x[c], row, column);
      }
    }
    float* scale_ptr = static_cast<float*>(row.scale) + row.scale_at;
    Acc scale = static_cast<Acc>(row.factor);
    if (row.own_scale) {
      Acc most = 0;
#pragma unroll
      for (int e = 0; e < kChunks * kWidth; ++e) most = larger(most, fabs(x[e / kWidth][e % kWidth]));
      for (int delta = row.lanes / 2; delta > 0; delta /= 2) {
        most = larger(most, __shfl_xor_sync(0xffffffff, most, delta));
      }
      const float own = static_cast<float>(most / (p.int8 ? 127 : 448));
      if (row.lane == 0 && row.exists) ptx::st_global(scale_ptr, own);
      scale = own;
    } else if (row.scale != nullptr) {  // of all heads, or of each
      scale = ptx::ld_global(scale_ptr);
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int column = (c * row.lanes + row.lane) * kWidth;
      if (column >= row.columns) continue;
      Fragment<unsigned char, kWidth> codes;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const float number = scale == 0 ? 0.0f : to_odd(x[c][e] / scale);
        codes.element[e] = p.int8 ? to_int8(number) : to_e4m3(number);
      }
      unsigned char* to = static_cast<unsigned char*>(row.to) + row.to_at + column * row.to_stride;
      store_left(to, codes, row.columns - column, row.to_stride, row.vector);
    }
  }

 private:
  static __device__ __forceinline__ Acc larger(Acc a, Acc b) { return b > a || isnan(b) ? b : a; }  // NaN if either is

  template <class T>
  static __device__ __forceinline__ void load(Acc (&x)[kWidth], const NewRow& row, int column) {
    constexpr int kChunk = 16 / sizeof(T);
    const T* from = static_cast<const T*>(row.from) + row.from_at;
#pragma unroll
    for (int e = 0; e < kWidth; e += kChunk) {
      Fragment<T, kChunk> chunk;
      if (row.vector) {
        chunk = ptx::ld_global(reinterpret_cast<const Fragment<T, kChunk>*>(from + column + e));
      } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const int at = column + e + i;
          chunk.element[i] = at < row.columns ? ptx::ld_global(from + at * row.from_stride) : T();
        }
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[e + i] = to_acc<Acc>(chunk.element[i]);
    }
  }
};

template <class Row, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) attention_kv_append(const __grid_constant__ KvAppendParams params) {
  const NewRow row(params, kThreads);
  Row::store(row, params);
}
