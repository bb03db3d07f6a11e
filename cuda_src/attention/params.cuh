// What an attention call hands to its kernel (cuattn/_device/params.py). Strides are in elements, of any sign, 0 for
// what is broadcast.
#pragma once

#include <ptx/cp_async_bulk.cuh>

// What a score expression indexes: its arrays in the order of their names, strides in elements, and sizes of 1 for
// dimensions that an array has not (cuattn/_attention/plan_score.py).
struct ScoreArrays {
  const void* array[6];
  long long size[6][4], stride[6][4];
};

struct AttentionParams {
  const void* q;                  // T [batch, heads, q_rows, head_dim]
  const void* k;                  // T [batch, heads / sharing, k_rows, head_dim]
  const void* v;                  // T [batch, heads / sharing, k_rows, value_dim]
  void* out;                      // T or float [batch, heads, q_rows, value_dim]
  void* lse;                      // Acc [batch, heads, q_rows]; null: not wanted
  const void* mask;               // bool [batch, heads, mask_rows, mask_cols], true = attend
  const void* bias;               // [batch, heads, bias_rows, bias_cols], added
  const void* alibi_slopes;       // Acc [batch, heads]; null: none
  const void* sinks;              // Acc [heads]; null: none
  const long long* q_offset;      // [batch]; null: offset_kind
  const long long* q_lens;        // [batch]; null: all
  const long long* kv_lens;       // [batch]; null: all
  const long long* cu_seqlens_q;  // [batch + 1], ragged: q and out have one batch, cut here; null: dense
  const long long* cu_seqlens_k;
  double scale;
  double softcap;             // 0: none
  long long left, right;      // window; kUnbounded
  long long offset;           // of the queries' positions
  int bottom_right;           // 1: the offset is kv_len - q_len, whatever `offset` says
  int batch, heads, sharing;  // sharing: query heads per key head
  int q_rows, k_rows, head_dim, value_dim;
  int mask_rows, mask_cols, bias_rows, bias_cols;
  int row_blocks;     // blocks of query rows per head; ragged: of all sequences together, at most
  int heads_in_l2;    // heads whose K and V stay in L2 together
  int descending;     // 1: the last rows first, which see most keys
  int out_is_vector;  // 1: whole chunks of 16 bytes can be stored
  int out_is_float;   // 1: out is float, T has 16 bits
  long long q_stride[4], k_stride[4], v_stride[4], out_stride[4];  // batch, head, row, column
  long long lse_stride[3], mask_stride[4], bias_stride[4], alibi_stride[2];
  ScoreArrays score_arrays;

  static constexpr long long kUnbounded = 1LL << 40;
};

// Of attention/column_sums.cuh.
struct AttentionColumnSumsParams {
  AttentionParams attention;  // its lse is read; v and out are not there; sharing: query heads of a block
  void* sums;                 // Acc [batch, heads, k_rows]
  long long group;            // query heads per key head
  long long sums_stride[3];
};

// The first element of a row of q, k, v or out.
template <class T, class Void>
__device__ __forceinline__ T* row_of(Void* array, const long long (&stride)[4], long long batch, long long head,
                                     long long row) {
  return static_cast<T*>(array) + batch * stride[0] + head * stride[1] + row * stride[2];
}

// What the persistent blocks of a kernel share out, of rows or of keys: each block of the grid computes one of them in
// a round, of one section after another. Within a section, what takes long makes up for what is short.
struct Schedule {
  int blocks, section;  // of them, in all and in a section
  int rounds, turns;    // in all, and for a section

  // The index of what this block computes in a round. False: nothing.
  __device__ __forceinline__ bool find(int round, unsigned int& index) const {
    // In serpentine order, odd rounds of a section running backwards, the block with the longest rows in one round gets
    // the shortest in the next. It begins where the section before would go on, for blocks that had a round less.
    const unsigned int width = gridDim.x, turn = static_cast<unsigned int>(round) % turns;
    const unsigned int first = static_cast<unsigned int>(round) / turns * section;
    const unsigned int from_first = (blockIdx.x + width - first % width) % width;
    const unsigned int place = turn * width + (turn % 2 == 0 ? from_first : width - 1 - from_first);
    index = first + place;
    return place < static_cast<unsigned int>(section) && index < static_cast<unsigned int>(blocks);
  }
};

// Of attention/forward_sm90.cuh. Boxes have as many columns as a panel (attention/panels.cuh), and k and v as many rows
// as a tile of keys; q and out have 2^pack_log2 heads and as many rows of each as make 64 in all. The dimensions are
// column, head within a pack, row, pack of heads, batch; `heads` and `sharing` of AttentionParams count packs.
// Attention: AttentionParams, or with a block mask what has these and its lists (attention/key_tiles.cuh).
template <class Attention>
struct AttentionSm90Params {
  TensorMap q, k, v, out;
  Attention attention;
  int pack_log2;
  Schedule schedule;  // of blocks of rows
};
