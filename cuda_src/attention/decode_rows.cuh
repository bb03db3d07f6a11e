// The rows of a decode tile, and what they see: row r of a key head is query r / group, head r % group of the group.
#pragma once

#include <attention/key_cursor.cuh>
#include <attention/scores.cuh>

// Rows first … first + count - 1 of a key head of one sequence.
struct RowTile {
  const DecodeParams& p;
  int b, head;  // sequence, key head
  int first, count;
  const Lengths& lengths;

  __device__ __forceinline__ int query(int row) const { return (first + row) / p.group; }
  __device__ __forceinline__ int query_head(int row) const { return head * p.group + (first + row) % p.group; }
  __device__ __forceinline__ bool is_padding(int row) const { return query(row) >= lengths.q_len; }
};

// How the scores of one row of a lane change, and which keys it sees. kRule: softcap, ALiBi and mask, by run-time
// parameters, and scaled here; else the softmax alone scales.
template <bool kRule, class Acc>
struct RowRule {
  using Base = ScoreBase<Acc>;
  int low, high;  // keys
  long long place;
  Acc slope;
  const bool* mask;  // of the last keys: column 0 is key mask_begin

  __device__ __forceinline__ RowRule() {}
  __device__ __forceinline__ RowRule(const RowTile& rows, int row) : slope(0), mask(nullptr) {
    const DecodeParams& p = rows.p;
    const bool none = row >= rows.count || rows.is_padding(row);
    const int query = none ? 0 : rows.query(row);
    low = none ? 0 : rows.lengths.low(p, query);
    high = none ? 0x7fffffff : rows.lengths.high(p, query);  // nobody reads what such a row gives
    place = query + rows.lengths.offset;
    if constexpr (kRule) {
      const long long h = none ? 0 : rows.query_head(row);
      if (p.alibi_slopes != nullptr) {
        slope = ptx::ld_global(static_cast<const Acc*>(p.alibi_slopes) + rows.b * p.alibi_stride[0] +
                               h * p.alibi_stride[1]);
      }
      if (p.mask != nullptr) {
        mask = static_cast<const bool*>(p.mask) + rows.b * p.mask_stride[0] + h * p.mask_stride[1] +
               query * p.mask_stride[2];
      }
    }
  }

  __device__ __forceinline__ bool sees(const DecodeParams& p, int kv_len, int key) const {
    if (key < low || key >= high) return false;
    if constexpr (kRule) {
      const int column = key - (kv_len - p.mask_cols);
      if (mask != nullptr && column >= 0) return ptx::ld_global(mask + column * p.mask_stride[3]);
    }
    return true;
  }
  __device__ __forceinline__ Acc score(const DecodeParams& p, Acc s, int key) const {
    if constexpr (!kRule) return s;
    s *= static_cast<Acc>(p.scale);
    if (p.softcap != 0) {
      const Acc cap = static_cast<Acc>(p.softcap), x = s / cap;
      if (fabs(x) > Base::kLinear) s = cap * tanh(x);
    }
    if (slope != 0) {
      const long long distance = place - key;
      s -= slope * static_cast<Acc>(distance < 0 ? -distance : distance);
    }
    return s;
  }
};
