// What `kv_append` hands to its kernel (cuattn/_device/params.py), and which row of it a team of threads has. Strides
// are in elements, of any sign, 0 for what is broadcast.
#pragma once

#include <attention/cache_rows.cuh>

enum : int { kHalf, kBfloat16, kFloat, kDouble };  // new_dtype
enum : int { kWideLens = 1, kWideTable = 2, kWideNew = 4 };

struct KvAppendParams {
  const void* k_new;       // [batch, kv_heads, new_rows, head_dim]
  const void* v_new;       // [batch, kv_heads, new_rows, value_dim]
  void* k_cache;           // [pages, kv_heads, page_size, head_dim], as k_new or of 8 bits
  void* v_cache;           // [pages, kv_heads, page_size, value_dim], likewise
  void* k_scale;           // float [pages, kv_heads, page_size]; null: k_factor
  void* v_scale;           // likewise
  const void* kv_lens;     // [batch], int or long long
  const void* page_table;  // [batch, table_cols], likewise; null: page b of sequence b
  const void* new_lens;    // [batch], likewise; null: new_rows
  double k_factor, v_factor;
  int batch, kv_heads, new_rows, head_dim, value_dim;
  int pages, page_size, table_cols;
  int new_dtype;  // kHalf …
  int int8;       // 1: numbers of 8 bits are int8; 0: e4m3
  int wide;       // which integers are long long: kWideLens …
  int key_blocks;
  int lanes[2], vector[2], own_scale[2];           // of keys and of values; own_scale: 1, computed and written
  long long new_stride[2][4], cache_stride[2][4];  // batch or page, head, row, column
  long long scale_stride[2][3];                    // page, head, row
  long long kv_lens_stride, new_lens_stride, table_stride[2];
};

// Page and row of new key i of sequence b, whatever lengths and table hold. page < 0: it has no place.
struct NewPlace {
  long long page = -1, row = 0;

  __device__ __forceinline__ NewPlace(const KvAppendParams& p, long long b, int i) {
    if (b >= p.batch) return;
    if (p.new_lens != nullptr && i >= ld_integer(p.new_lens, b * p.new_lens_stride, p.wide & kWideNew)) return;
    const bool paged = p.page_table != nullptr;
    const long long room = paged ? static_cast<long long>(p.table_cols) * p.page_size : p.page_size;
    const long long length = ld_integer(p.kv_lens, b * p.kv_lens_stride, p.wide & kWideLens);
    const long long key = (length < 0 ? 0 : length < room ? length : room) + i;
    if (key >= room) return;
    row = paged ? key % p.page_size : key;
    page = b;
    if (!paged) return;
    const long long at = b * p.table_stride[0] + key / p.page_size * p.table_stride[1];
    page = ld_integer(p.page_table, at, p.wide & kWideTable);
    if (page >= p.pages) page = -1;
  }
};

// What a team has: a new row, and its place in the cache.
struct NewRow {
  const void* from;
  void* to;
  void* scale;
  long long from_at, to_at, scale_at, from_stride, to_stride;  // elements
  int columns, lanes, lane;                                    // no columns without a place
  bool exists, vector, own_scale;
  double factor;

  __device__ __forceinline__ NewRow(const KvAppendParams& p, int threads) {
    const bool values = blockIdx.x >= p.key_blocks;
    lanes = p.lanes[values], lane = static_cast<int>(threadIdx.x) & lanes - 1;
    vector = p.vector[values], own_scale = p.own_scale[values];
    const long long block = values ? blockIdx.x - p.key_blocks : blockIdx.x;
    const long long team = (block * threads + threadIdx.x) / lanes, token = team / p.kv_heads;
    const long long head = team % p.kv_heads, i = token % p.new_rows, b = token / p.new_rows;
    const NewPlace place(p, b, static_cast<int>(i));
    exists = place.page >= 0;
    columns = exists ? values ? p.value_dim : p.head_dim : 0;
    from = values ? p.v_new : p.k_new, to = values ? p.v_cache : p.k_cache;
    scale = values ? p.v_scale : p.k_scale, factor = values ? p.v_factor : p.k_factor;
    const long long* s = p.new_stride[values];
    from_at = b * s[0] + head * s[1] + i * s[2], from_stride = s[3];
    s = p.cache_stride[values];
    to_at = place.page * s[0] + head * s[1] + place.row * s[2], to_stride = s[3];
    s = p.scale_stride[values];
    scale_at = place.page * s[0] + head * s[1] + place.row * s[2];
  }
};
