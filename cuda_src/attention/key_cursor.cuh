// Which keys a block of a decode kernel attends to: its share of all work, found on the device, and a walk through it.
//
// Units of work lie in the order sequence, key head, tile of rows, tile of columns, part of the keys. A block has
// consecutive ones: an equal share of all. Of one (sequence, head, rows, columns), a pair, it has a segment of key tiles
// at a time. With `split` a unit is that many tiles, cut at absolute multiples: then the bits of a sequence depend on
// nothing but itself. Without, a unit is a tile, and shares are equal to a tile.
#pragma once

#include <attention/decode_params.cuh>
#include <ptx/memory.cuh>

// Element b of an array of int or long long.
__device__ __forceinline__ long long ld_index(const DecodeParams& p, int which, const void* array, long long element) {
  if (p.wide >> which & 1) return ptx::ld_global(static_cast<const long long*>(array) + element);
  return ptx::ld_global(static_cast<const int*>(array) + element);
}
enum : int { kKvLens, kPageTable, kQLens, kQOffset };

// Lengths of one sequence, from whatever the arrays hold to what exists.
struct Lengths {
  int q_len, kv_len;
  long long offset;  // query i is at place i + offset among the keys
  int begin, end;    // keys that some query sees

  __device__ __forceinline__ Lengths() {}
  __device__ __forceinline__ Lengths(const DecodeParams& p, int b) {
    const long long rows = p.page_table != nullptr ? static_cast<long long>(p.table_cols) * p.page_size : p.page_size;
    const long long kv = p.kv_lens == nullptr ? rows : ld_index(p, kKvLens, p.kv_lens, b * p.kv_lens_stride);
    const long long q = p.q_lens == nullptr ? p.q_rows : ld_index(p, kQLens, p.q_lens, b * p.q_lens_stride);
    kv_len = static_cast<int>(clamp(kv, 0, rows));
    q_len = static_cast<int>(clamp(q, 0, p.q_rows));
    constexpr long long kMost = DecodeParams::kUnbounded;
    offset = p.bottom_right ? kv_len - q_len : p.offset;
    if (p.q_offset != nullptr) offset = clamp(ld_index(p, kQOffset, p.q_offset, b * p.q_offset_stride), -kMost, kMost);
    begin = low(p, 0);
    end = q_len == 0 ? begin : high(p, q_len - 1);
    end = end < begin ? begin : end;
  }
  // Query i sees keys low … high - 1.
  __device__ __forceinline__ int low(const DecodeParams& p, int i) const {
    return static_cast<int>(clamp(i + offset - p.left, 0, kv_len));
  }
  __device__ __forceinline__ int high(const DecodeParams& p, int i) const {
    return static_cast<int>(clamp(i + offset + p.right + 1, 0, kv_len));
  }

 private:
  static __device__ __forceinline__ long long clamp(long long value, long long low, long long high) {
    return value < low ? low : value < high ? value : high;
  }
};

template <int kKeys>
struct KeyCursor {
  const DecodeParams& p;
  int b = 0, pair = 0;  // sequence; pair of it: key head, then tile of rows, then tile of columns
  Lengths lengths;
  int tile, stop;       // the segment: tiles tile … stop - 1
  long long left;       // units of this block from `tile` on

  __device__ __forceinline__ explicit KeyCursor(const DecodeParams& p) : p(p) {}

  __device__ __forceinline__ int pairs() const { return p.kv_heads * p.row_tiles * p.column_tiles; }
  __device__ __forceinline__ int head() const { return pair / (p.row_tiles * p.column_tiles); }
  __device__ __forceinline__ int row_tile() const { return pair / p.column_tiles % p.row_tiles; }
  __device__ __forceinline__ int column_tile() const { return pair % p.column_tiles; }

  // Tiles of a pair: at least one, so that somebody writes its zeros.
  static __device__ __forceinline__ int first_tile(const Lengths& of) { return of.begin / kKeys; }
  static __device__ __forceinline__ int end_tile(const Lengths& of) {
    return max(of.begin / kKeys + 1, (of.end + kKeys - 1) / kKeys);
  }
  __device__ __forceinline__ int units(const Lengths& of) const {
    const int first = first_tile(of), end = end_tile(of);
    return p.split == 0 ? end - first : (end - 1) / p.split - first / p.split + 1;
  }
  // The unit of its pair that begins with tile `of_pair`.
  __device__ __forceinline__ int unit() const {
    const int first = first_tile(lengths);
    return p.split == 0 ? tile - first : tile / p.split - first / p.split;
  }
  __device__ __forceinline__ bool is_whole() const {
    return tile == first_tile(lengths) && stop == end_tile(lengths);
  }

  // To unit `unit` of pair `pair` of sequence `b`.
  __device__ __forceinline__ void enter(int unit) {
    const int first = first_tile(lengths);
    tile = p.split == 0 || unit == 0 ? first + unit : (first / p.split + unit) * p.split;
    open();
  }
  __device__ __forceinline__ void open() {
    stop = end_tile(lengths);
    if (p.split != 0) {
      stop = min(stop, (tile / p.split + 1) * p.split);
    } else if (left < stop - tile) {
      stop = tile + static_cast<int>(left);
    }
  }
  __device__ __forceinline__ void next_segment() {
    left -= p.split == 0 ? stop - tile : 1;
    tile = stop;
    if (left <= 0) return;
    if (tile < end_tile(lengths)) return open();
    if (++pair == pairs()) {
      pair = 0;
      lengths = Lengths(p, ++b);
    }
    enter(0);
  }
};

// Where a block's share lies.
struct Share {
  long long units, shares;  // of the launch; blocks that have one
  long long begin, count;   // of this block

  // Units begin to lie in share `unit_share`.
  __device__ __forceinline__ long long of_unit(long long unit) const { return ((unit + 1) * shares - 1) / units; }
  __device__ __forceinline__ long long first_unit(long long share) const { return units * share / shares; }
};

// The share of block `rank` of `blocks`, and the cursor at its begin. Every warp finds it by itself, 32 sequences at a
// time.
template <int kKeys>
__device__ __forceinline__ Share find_share(KeyCursor<kKeys>& cursor, int rank, int blocks) {
  const DecodeParams& p = cursor.p;
  const int lane = static_cast<int>(threadIdx.x) % 32, pairs = cursor.pairs();
  Share share;
  share.units = 0;
  for (int b = lane; b < p.batch; b += 32) share.units += cursor.units(Lengths(p, b));
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) share.units += __shfl_xor_sync(0xffffffff, share.units, delta);
  share.units *= pairs;
  const long long most = p.split != 0 ? share.units : share.units / p.least_tiles;
  share.shares = most < 1 ? 1 : most < blocks ? most : blocks;
  share.begin = share.first_unit(rank);
  share.count = rank < share.shares ? share.first_unit(rank + 1) - share.begin : 0;
  if (share.count == 0) return share;

  long long before = 0;  // units of earlier sequences
  for (int base = 0;; base += 32) {
    const int b = base + lane, own = b < p.batch ? cursor.units(Lengths(p, b)) : 0;
    long long up_to = own;  // of this sequence and those of lower lanes
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const long long below = __shfl_up_sync(0xffffffff, up_to, delta);
      if (lane >= delta) up_to += below;
    }
    const unsigned int past =
        __ballot_sync(0xffffffff, share.begin < before + up_to * pairs);
    const int owner = past != 0 ? __ffs(past) - 1 : 31;
    before += __shfl_sync(0xffffffff, past != 0 ? up_to - own : up_to, owner) * pairs;
    if (past == 0) continue;
    cursor.b = base + owner;
    break;
  }
  cursor.lengths = Lengths(p, cursor.b);
  const int each = cursor.units(cursor.lengths);
  cursor.pair = static_cast<int>((share.begin - before) / each);
  cursor.left = share.count;
  cursor.enter(static_cast<int>((share.begin - before) % each));
  return share;
}
