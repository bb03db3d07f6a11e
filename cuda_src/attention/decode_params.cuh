// What a call over a KV cache hands to its kernel (cuattn/_device/params.py). Strides are in elements, of any sign, 0
// for what is broadcast.
//
// Key j of sequence b is row j % page_size of page page_table[b][j / page_size]; without a table it is row j of page b.
// Keys kv_lens[b] and on are those of k_new and v_new, which the kernel writes into the cache as well.
#pragma once

#include <attention/params.cuh>

enum : int { kCacheOfT, kCacheInt8, kCacheE4m3 };  // cache_kind

struct DecodeParams {
  const void* q;             // T [batch, heads, q_rows, head_dim]
  void* k;                   // T or 8 bits [pages, kv_heads, page_size, head_dim]
  void* v;                   // likewise [pages, kv_heads, page_size, value_dim]
  void* out;                 // T or float [batch, heads, q_rows, value_dim]
  void* lse;                 // Acc [batch, heads, q_rows]; null: not wanted
  const void* mask;          // bool [batch, heads, q_rows, mask_cols] of the last keys, true = attend; null: none
  const void* alibi_slopes;  // Acc [batch, heads]; null: none
  const void* sinks;         // Acc [heads]; null: none
  const void* kv_lens;       // [batch], int or long long; null: all
  const void* page_table;    // [batch, table_cols], likewise; null: dense
  const void* q_lens;        // [batch], likewise; null: all
  const void* q_offset;      // [batch], likewise; null: `offset`
  const void* k_new;         // T [batch, kv_heads, new_rows, head_dim]; null: none to write
  const void* v_new;         // T [batch, kv_heads, new_rows, value_dim]; null: columns of k_new, and of k
  const float* k_scale;      // [pages, kv_heads, page_size] of 8 bits; null: in `scale`
  const float* v_scale;      // likewise; null: v_factor
  void* parts;               // of rows whose keys several blocks share: Acc [slots][rows][value_dim + 3]
  unsigned int* counters;    // zero before and after every launch
  double scale;
  double softcap;  // 0: none
  double v_factor;
  long long left, right;       // window; kUnbounded
  long long offset;            // of the queries' positions
  int bottom_right;            // 1: the offset is the number of keys less that of queries, whatever `offset` says
  int batch, kv_heads, group;  // group: query heads per key head
  int q_rows, new_rows;        // new_rows: of a sequence, min(q_lens, new_rows) keys more than kv_lens; cut at the room
  int head_dim, value_dim, mask_cols;
  int pages, page_size, table_cols;
  unsigned int page_magic;
  int page_shift;    // j / page_size = (2 j page_magic / 2^32) >> page_shift, for 0 <= j < 2^31
  int row_tiles;     // of a key head: its group's rows of all queries, kRows at a time
  int column_tiles;  // of value_dim, kValueDim at a time
  int least_tiles;   // of keys that a block has at least, where there are not enough for all
  int split;         // tiles of keys of a part; 0: each block has an equal share
  int wide;          // bit i: long long elements of kv_lens, page_table, q_lens, q_offset (i = 0 … 3)
  int cache_kind;
  int rule;            // 1: scores are more than scaled by a positive number, or masked by an array
  int vector;          // 1: rows of q, k and v are whole chunks of 16 bytes
  int out_is_vector;   // 1: whole chunks of 16 bytes can be stored
  int out_is_float;    // 1: out is float, T has 16 bits
  int new_is_vector;   // 1: `vector`, and rows of k_new and v_new likewise
  int is_async;        // 1: `vector`, and new rows likewise if there are some to read
  int same_strides;    // 1: of pages and rows of k and v
  int values_in_keys;  // 1: v is k, and its tile the first columns of that of k
  long long q_stride[4], k_stride[4], v_stride[4], out_stride[4];  // batch or page, head, row, column
  long long k_new_stride[4], v_new_stride[4], mask_stride[4];
  long long lse_stride[3], k_scale_stride[3], v_scale_stride[3], alibi_stride[2], table_stride[2];
  long long kv_lens_stride, q_lens_stride, q_offset_stride, sinks_stride;
  ScoreArrays score_arrays;

  static constexpr long long kUnbounded = 1LL << 40;
};
