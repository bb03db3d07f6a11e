// What a call of attention_backward hands to its kernels (cuattn/_device/params.py).
#pragma once

#include <attention/params.cuh>

struct AttentionBackwardParams {
  AttentionParams attention;                     // of the forward call; `out` and `lse` are read
  const void* grad;                              // T, as out: the gradient of what was returned
  const void* grad_lse;                          // Acc, as lse; null: 0
  void* dq;                                      // T, as q
  void* dk;                                      // T, as k
  void* dv;                                      // T, as v
  void* stats;                                   // Acc, attention/backward.cuh
  int has_slopes;                                // 1: behind the statistics of all rows lies a share of dslope of each
  int dq_is_vector, dk_is_vector, dv_is_vector;  // 1: whole chunks of 16 bytes can be stored
  long long stat_rows;                           // of a head
  long long grad_stride[4], dq_stride[4], dk_stride[4], dv_stride[4];
  long long grad_lse_stride[3];
};

// Of attention/backward_bias.cuh.
struct AttentionBackwardBiasParams {
  AttentionBackwardParams backward;
  void* dbias;                     // Bias [batches, heads, rows, cols]
  int batches, heads, rows, cols;  // of the bias itself: 1 where it is broadcast
  int row_blocks, col_blocks;      // of a matrix of it
  long long dbias_stride[4];
};

// Of attention/backward_score.cuh and, all of it, of attention/backward_elements.cuh.
struct AttentionBackwardScoreParams {
  AttentionBackwardParams backward;
  void* sums;              // Acc [heads of sequences; ragged: heads] [slots] [2 rows, or 1]
  int slots, log2;         // a slot is a diagonal of tiles, of 2^log2 rows and keys (attention/distances.cuh)
  int by_distance;         // 0: a slot has the sum of all of its distances
  int units, unit_step;    // heads whose places differ, and from one to the next of them
  int shared;              // heads that share their places with each
  const void* before;      // Acc [count]: what other references have added; null: 0
  void* elements;          // Element [count]
  long long count, range;  // of elements: of the array, of a block
  long long shared_step;   // slots from one to the next of those that share
};

// Of attention/backward_sums.cuh.
struct AttentionBackwardSumsParams {
  AttentionBackwardParams backward;
  void* dsinks;             // Acc [heads]; null: none
  void* dslopes;            // Acc [slope_batches, heads]; null: none
  long long slope_batches;  // 1, or the batch
};

// Images of dS, and the heads whose they are: some heads after others take the same memory. An image has 64 keys, each
// a row of 64 queries; one head's are those of its first 64 keys, of all queries, then those of the next keys.
struct ScoreGradients {
  void* images;          // T; null: none
  int units, unit;       // heads of K here, and the first of them
  int q_tiles, k_tiles;  // of 64 rows, of a head: even numbers
};

// Of the kernels of Hopper. Boxes have as many columns as a panel (attention/panels.cuh), and as many rows as a tile.
struct AttentionBackwardSm90Params {
  TensorMap q, k, v, grad;
  AttentionBackwardParams backward;
  ScoreGradients ds;
  Schedule schedule;  // of blocks of queries or of keys
};

// Of attention/backward_ds_sm90.cuh: boxes of 64 rows.
struct AttentionBackwardDsParams {
  TensorMap k, ds;
  AttentionBackwardParams backward;
  ScoreGradients ds_of;
  Schedule schedule;  // of blocks of queries
};
