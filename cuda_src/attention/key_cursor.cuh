// The keys of a block of a decode kernel: its share of all, which it finds on the device from the lengths.
// A share consists of segments, one after another.
//
// Units of work lie in the order sequence, key head, tile of rows, tile of columns, part of the keys. A block has
// consecutive ones: an equal share of all. Of one (sequence, head, rows, columns), a pair, it has a segment of key
// tiles at a time. With `split` a unit is that many tiles, cut at absolute multiples: then the bits of a sequence
// depend on nothing but itself. Without, a unit is a tile, and shares are equal to a tile.
#pragma once

#include <attention/cache_rows.cuh>
#include <attention/decode_params.cuh>
#include <attention/scores.cuh>

enum : int { kKvLens, kPageTable, kQLens, kQOffset };  // bits of DecodeParams::wide

__device__ __forceinline__ bool is_wide(const DecodeParams& p, int which) { return (p.wide >> which & 1) != 0; }

// Lengths of one sequence, from whatever the arrays hold to what exists.
struct Lengths {
  int q_len, kv_len;
  int old;           // keys that were there before the call
  long long offset;  // query i is at place i + offset among the keys
  int begin, end;    // keys that some query sees

  __device__ __forceinline__ Lengths() {}
  __device__ __forceinline__ Lengths(const DecodeParams& p, int b) {
    const long long room = p.page_table != nullptr ? static_cast<long long>(p.table_cols) * p.page_size : p.page_size;
    const long long kv = p.kv_lens == nullptr ? room : ld_integer(p.kv_lens, b * p.kv_lens_stride, is_wide(p, kKvLens));
    const long long q = p.q_lens == nullptr ? p.q_rows : ld_integer(p.q_lens, b * p.q_lens_stride, is_wide(p, kQLens));
    q_len = static_cast<int>(clamp_index(q, 0, p.q_rows));
    old = static_cast<int>(clamp_index(kv, 0, room));
    const long long fresh = p.q_lens == nullptr ? p.new_rows : min(q_len, p.new_rows);
    kv_len = static_cast<int>(min(old + fresh, room));
    constexpr long long kMost = DecodeParams::kUnbounded;
    offset = p.bottom_right ? kv_len - q_len : p.offset;
    if (p.q_offset != nullptr)
      offset = clamp_index(ld_integer(p.q_offset, b * p.q_offset_stride, is_wide(p, kQOffset)), -kMost, kMost);
    begin = low(p, 0);
    end = q_len == 0 ? begin : high(p, q_len - 1);
  }
  // Query i sees keys low … high - 1.
  __device__ __forceinline__ int low(const DecodeParams& p, int i) const {
    return static_cast<int>(clamp_index(i + offset - p.left, 0, kv_len));
  }
  __device__ __forceinline__ int high(const DecodeParams& p, int i) const {
    return static_cast<int>(clamp_index(i + offset + p.right + 1, 0, kv_len));
  }
};

// The row of a sequence in the page table; null: dense.
__device__ __forceinline__ const char* table_row(const DecodeParams& p, int b) {
  const int item = is_wide(p, kPageTable) ? 8 : 4;
  return p.page_table == nullptr ? nullptr : static_cast<const char*>(p.page_table) + b * p.table_stride[0] * item;
}

// Where a key of a sequence lies.
struct KeyPlace {
  int page, row;  // page < 0: nowhere

  __device__ __forceinline__ KeyPlace() {}
  __device__ __forceinline__ KeyPlace(const DecodeParams& p, int b, const char* table, int key, bool wanted)
      : page(b), row(key) {
    if (p.page_table == nullptr) return;
    const int number = static_cast<int>(__umulhi(2u * key, p.page_magic) >> p.page_shift);  // key / page_size
    row = key - number * p.page_size;
    page = -1;
    if (!wanted) return;
    if (is_wide(p, kPageTable)) {
      const long long found = ptx::ld_global(reinterpret_cast<const long long*>(table) + number * p.table_stride[1]);
      if (found >= 0 && found < p.pages) page = static_cast<int>(found);
    } else {
      const int found = ptx::ld_global(reinterpret_cast<const int*>(table) + number * p.table_stride[1]);
      if (found < p.pages) page = found;
    }
  }
  // Elements from row 0 of page 0.
  __device__ __forceinline__ long long offset(const long long (&stride)[4]) const {
    return static_cast<unsigned int>(page) * stride[0] + static_cast<unsigned int>(row) * stride[2];
  }
};

// A place in the order of all units: a segment, tiles tile … stop - 1 of one pair.
template <int kKeys>
struct KeyCursor {
  int b = 0, head = 0;      // sequence, key head
  int row = 0, column = 0;  // tiles of rows, of columns
  int tile, stop;
  long long left;  // units of this block from `tile` on
  long long unit;  // number of the first of them in the launch
  Lengths lengths;

  // Tiles of a pair: at least one, so that somebody writes its zeros.
  static __device__ __forceinline__ int first_tile(const Lengths& of) { return of.begin / kKeys; }
  static __device__ __forceinline__ int end_tile(const Lengths& of) {
    return max(of.begin / kKeys + 1, (of.end + kKeys - 1) / kKeys);
  }
  static __device__ __forceinline__ int units(const DecodeParams& p, const Lengths& of) {
    const int first = first_tile(of), end = end_tile(of);
    return p.split == 0 ? end - first : (end - 1) / p.split - first / p.split + 1;
  }
  // The number of the unit at `tile` in its pair.
  __device__ __forceinline__ int unit_of_pair(const DecodeParams& p) const {
    const int first = first_tile(lengths);
    return p.split == 0 ? tile - first : tile / p.split - first / p.split;
  }
  __device__ __forceinline__ long long pair(const DecodeParams& p) const {
    return ((static_cast<long long>(b) * p.kv_heads + head) * p.row_tiles + row) * p.column_tiles + column;
  }
  __device__ __forceinline__ bool is_whole() const { return tile == first_tile(lengths) && stop == end_tile(lengths); }

  // To a unit of this pair.
  __device__ __forceinline__ void enter(const DecodeParams& p, int unit_of_pair) {
    const int first = first_tile(lengths);
    tile = p.split == 0 || unit_of_pair == 0 ? first + unit_of_pair : (first / p.split + unit_of_pair) * p.split;
    open(p);
  }
  __device__ __forceinline__ void open(const DecodeParams& p) {
    stop = end_tile(lengths);
    if (p.split != 0) {
      stop = min(stop, (tile / p.split + 1) * p.split);
    } else if (left < stop - tile) {
      stop = tile + static_cast<int>(left);
    }
  }
  __device__ __forceinline__ void next_segment(const DecodeParams& p) {
    const int passed = p.split == 0 ? stop - tile : 1;
    left -= passed;
    unit += passed;
    tile = stop;
    if (left <= 0) return;
    if (tile < end_tile(lengths)) return open(p);
    if (++column == p.column_tiles) {
      column = 0;
      if (++row == p.row_tiles) {
        row = 0;
        if (++head == p.kv_heads) {
          head = 0;
          lengths = Lengths(p, ++b);
        }
      }
    }
    enter(p, 0);
  }
};

// How units are shared out among blocks.
struct Shares {
  long long units, blocks;  // of the launch; blocks that have a share

  // Units begin to lie in share `of_unit`.
  __device__ __forceinline__ long long of_unit(long long unit) const { return ((unit + 1) * blocks - 1) / units; }
  __device__ __forceinline__ long long first_unit(long long share) const { return units * share / blocks; }
};

// The begin of the share of block `rank` of `blocks`; of no units if there are not enough. Every warp finds it by
// itself, 32 sequences at a time.
template <int kKeys>
__device__ __forceinline__ KeyCursor<kKeys> find_share(const DecodeParams& p, int rank, int blocks, Shares& shares) {
  KeyCursor<kKeys> cursor;
  const int lane = static_cast<int>(threadIdx.x) % 32, pairs = p.kv_heads * p.row_tiles * p.column_tiles;
  long long units = 0;
#pragma unroll 1
  for (int b = lane; b < p.batch; b += 32) units += cursor.units(p, Lengths(p, b));
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) units += __shfl_xor_sync(0xffffffff, units, delta);
  shares.units = units * pairs;
  const long long most = p.split != 0 ? shares.units : shares.units / p.least_tiles;
  shares.blocks = most < 1 ? 1 : most < blocks ? most : blocks;
  cursor.unit = shares.first_unit(rank);
  cursor.left = rank < shares.blocks ? shares.first_unit(rank + 1) - cursor.unit : 0;
  if (cursor.left == 0) return cursor;

  long long before = 0;  // units of earlier sequences
#pragma unroll 1
  for (int base = 0;; base += 32) {
    const int b = base + lane, own = b < p.batch ? cursor.units(p, Lengths(p, b)) : 0;
    long long up_to = own;  // of this sequence and those of lower lanes
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const long long below = __shfl_up_sync(0xffffffff, up_to, delta);
      if (lane >= delta) up_to += below;
    }
    const unsigned int past = __ballot_sync(0xffffffff, cursor.unit < before + up_to * pairs);
    const int owner = past != 0 ? __ffs(past) - 1 : 31;
    before += __shfl_sync(0xffffffff, past != 0 ? up_to - own : up_to, owner) * pairs;
    if (past == 0) continue;
    cursor.b = base + owner;
    break;
  }
  cursor.lengths = Lengths(p, cursor.b);
  const int each = cursor.units(p, cursor.lengths);
  const int pair = static_cast<int>((cursor.unit - before) / each);
  cursor.column = pair % p.column_tiles;
  cursor.row = pair / p.column_tiles % p.row_tiles;
  cursor.head = pair / p.column_tiles / p.row_tiles;
  cursor.enter(p, static_cast<int>((cursor.unit - before) % each));
  return cursor;
}

// A struct in shared memory, one word at a time.
template <class S>
__device__ __forceinline__ void put_shared(S* to, const S& from) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(S) / 4); ++i) {
    ptx::st_shared(reinterpret_cast<unsigned int*>(to) + i, reinterpret_cast<const unsigned int*>(&from)[i]);
  }
}
template <class S>
__device__ __forceinline__ S get_shared(const S* from) {
  S result;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(S) / 4); ++i) {
    reinterpret_cast<unsigned int*>(&result)[i] = ptx::ld_shared(reinterpret_cast<const unsigned int*>(from) + i);
  }
  return result;
}
