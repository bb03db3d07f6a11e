// The rows of a decode tile, and what they see: row r of a key head is query r / group, head r % group of the group.
#pragma once

#include <attention/key_cursor.cuh>

// Rows first … first + count - 1 of a key head of one sequence.
struct RowTile {
  const DecodeParams& p;
  int b, head;  // sequence, key head
  int first, count;
  const Lengths& lengths;

  template <int kKeys>
  __device__ __forceinline__ RowTile(const DecodeParams& p, const KeyCursor<kKeys>& at, int rows)
      : p(p),
        b(at.b),
        head(at.head),
        first(at.row * rows),
        count(min(rows, p.group * p.q_rows - at.row * rows)),
        lengths(at.lengths) {}

  __device__ __forceinline__ int query(int row) const { return (first + row) / p.group; }
  __device__ __forceinline__ int query_head(int row) const { return head * p.group + (first + row) % p.group; }
  // Or does not exist.
  __device__ __forceinline__ bool is_padding(int row) const { return query(row) >= lengths.q_len; }
};

// How the scores of one row change, and which keys it sees. In shared memory: most tiles need none of it.
template <class Acc>
struct RowRule {
  using Base = ScoreBase<Acc>;
  long long place;   // of the query among the keys
  const bool* mask;  // of the last keys, the first of which is mask_begin; null: none
  Acc slope;
  int mask_begin;
  int low, high;  // keys; of a row that does not exist, or is padding, all, and nobody reads what they give: low is -1
  int head;       // of the query. Rows are 40 bytes, so that 16 of them begin in 16 banks

  static __device__ __forceinline__ void put(RowRule* to, const RowTile& rows, int row) {
    const DecodeParams& p = rows.p;
    const bool none = rows.is_padding(row);
    const long long query = none ? 0 : rows.query(row), head = none ? 0 : rows.query_head(row), b = rows.b;
    const bool* mask = nullptr;
    Acc slope = 0;
    if (p.alibi_slopes != nullptr) {
      const Acc* slopes = static_cast<const Acc*>(p.alibi_slopes);
      slope = ptx::ld_global(slopes + b * p.alibi_stride[0] + head * p.alibi_stride[1]);
    }
    if (p.mask != nullptr) {
      mask =
          static_cast<const bool*>(p.mask) + b * p.mask_stride[0] + head * p.mask_stride[1] + query * p.mask_stride[2];
    }
    const Lengths& of = rows.lengths;
    const int i = static_cast<int>(query);
    put_shared(to + row, RowRule{query + of.offset, mask, slope, of.kv_len - p.mask_cols, none ? -1 : of.low(p, i),
                                 none ? 0x7fffffff : of.high(p, i), static_cast<int>(head)});
  }

  __device__ __forceinline__ bool sees(const DecodeParams& p, int key) const {
    if (key < low || key >= high) return false;
    const int column = key - mask_begin;
    return mask == nullptr || column < 0 || ptx::ld_global(mask + column * p.mask_stride[3]);
  }
  // Only with p.rule; else the softmax alone scales.
  template <class Score>
  __device__ __forceinline__ Acc score(const DecodeParams& p, Acc s, int b, int key) const {
    s *= static_cast<Acc>(p.scale);
    if (p.softcap != 0) {
      const Acc cap = static_cast<Acc>(p.softcap), x = s / cap;
      if (fabs(x) > Base::kLinear) s = cap * tanh(x);  // else tanh x = x; and x may be subnormal
    }
    if (slope != 0) {
      const long long distance = place - key;
      s -= slope * static_cast<Acc>(distance < 0 ? -distance : distance);
    }
    if constexpr (!kIsSame<Score, NoScore>) {
      s = Score::template score<Acc>(s, b, head, place, key, p.score_arrays);
    }
    return s;
  }
};
