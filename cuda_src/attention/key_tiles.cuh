// The tiles of keys that a block of queries goes through: all between the first and the last key that one of them sees,
// or those of these that a block mask lists.
//
// A block mask cuts the matrix of scores into tiles of block_queries x block_keys. Both are multiples of what a block
// of threads computes at a time: a listed tile is some tiles of the kernel, one after the other.
#pragma once

#include <attention/scores.cuh>

struct AttentionBlockedParams {
  AttentionParams attention;
  const int* block_counts;    // [batch, heads, rows]: tiles of a row that are listed, those that are not empty
  const int* block_indices;   // [batch, heads, rows, block_cols]: these, ascending
  const bool* block_full;     // [batch, heads, rows, block_cols]: of each listed one, whether it hides nothing
  long long block_stride[2];  // batch, head; in rows of tiles
  long long mask_offset;      // of query 0 among the keys, as a mask expression has it
  int block_cols, block_queries, block_keys;
  ScoreArrays mask_arrays;  // what it indexes
};

// The mask of a block mask: the array of AttentionParams, or in its place a struct that is made of an expression
// (cuattn/_attention/plan_mask.py):
//   static bool seen(long long b, long long h, long long q, long long k, const ScoreArrays& arrays);
// b: sequence, h: query head, q, k: places of query and key among the keys.
struct ArrayMask {};

// Tiles `begin` to `end`, of `size` keys each; tile j begins with key(j). is_partial(j): the mask, if there is one, has
// to be asked. allowed(rule, row, col): whether it lets query `row` see key `col`, by the ScoreRule of their head.
struct AllTiles {
  using Params = AttentionParams;
  static constexpr bool kListed = false, kExpression = false;
  static constexpr int begin = 0;
  int end, first, size;

  __device__ __forceinline__ AllTiles(const Params&, const QueryBlock&, const QueryBlock::Keys& keys, int size)
      : end(keys.tiles), first(keys.first), size(size) {}

  static __device__ __forceinline__ const AttentionParams& attention(const Params& params) { return params; }
  __device__ __forceinline__ int key(int j) const { return first + j * size; }
  __device__ __forceinline__ bool is_partial(int) const { return true; }
  template <class Rule>
  __device__ __forceinline__ bool allowed(const Rule& rule, int row, int col) const {
    return rule.allowed(row, col);
  }
};

// The same, counted from the first that is listed of the row. Whatever an index is, no key but those from keys.begin to
// keys.end is loaded.
template <class Mask>
struct ListedTiles {
  using Params = AttentionBlockedParams;
  static constexpr bool kListed = true, kExpression = !kIsSame<Mask, ArrayMask>;
  const Params& params;
  int begin, end, size;
  int row;  // of tiles, of all heads

  __device__ __forceinline__ ListedTiles(const Params& params, const QueryBlock& block, const QueryBlock::Keys& keys,
                                         int size)
      : params(params), begin(0), end(0), size(size) {
    const long long head = block.batch * params.block_stride[0] + block.head * params.block_stride[1];
    row = static_cast<int>(head) + block.first / params.block_queries;
    if (keys.tiles == 0) return;
    const int listed = max(0, min(ptx::ld_global(params.block_counts + row), params.block_cols));
    const int low = search(listed, keys.begin / params.block_keys);
    const int high = search(listed, (keys.end - 1) / params.block_keys + 1);
    if (low >= high) return;
    begin = low * parts() + max(0, keys.begin - start(low)) / size;
    end = (high - 1) * parts() + min(parts(), (keys.end - start(high - 1) + size - 1) / size);
  }

  static __device__ __forceinline__ const AttentionParams& attention(const Params& params) { return params.attention; }
  __device__ __forceinline__ int key(int j) const {
    const int i = listed(j);
    return start(i) + (j - i * parts()) * size;
  }
  __device__ __forceinline__ bool is_partial(int j) const {
    return !ptx::ld_global(params.block_full + place(listed(j)));
  }
  template <class Rule>
  __device__ __forceinline__ bool allowed(const Rule& rule, int row, int col) const {
    if constexpr (kIsSame<Mask, ArrayMask>) {
      return rule.allowed(row, col);
    } else {
      return Mask::seen(rule.block.batch, rule.head, row + params.mask_offset, col, params.mask_arrays);
    }
  }

 private:
  __device__ __forceinline__ int parts() const { return params.block_keys / size; }  // of a listed tile
  // The one that tile j is a part of. A division takes long, and most have a power of two.
  __device__ __forceinline__ int listed(int j) const {
    const int n = parts();
    return (n & (n - 1)) == 0 ? j >> __popc(n - 1) : j / n;
  }
  __device__ __forceinline__ long long place(int i) const { return 1LL * row * params.block_cols + i; }
  __device__ __forceinline__ int tile(int i) const { return ptx::ld_global(params.block_indices + place(i)); }
  __device__ __forceinline__ int start(int i) const { return tile(i) * params.block_keys; }

  // The first of `count` listed tiles that is `least` or further on; `count`: none is.
  __device__ __forceinline__ int search(int count, int least) const {
    int low = 0;
    for (int high = count; low < high;) {
      const int middle = (low + high) / 2;
      (tile(middle) < least ? low : high) = tile(middle) < least ? middle + 1 : middle;
    }
    return low;
  }
};
