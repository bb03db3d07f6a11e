// What the host hands to every kernel of the softmax family (cuattn/_device/params.py).
//
// A row is one softmax; its elements are columns. Rows and columns are index spaces of kRowRank and kColRank
// dimensions, slowest first, after the host has dropped and joined every dimension it can; strides are in elements, of
// any sign, 0 for an operand that is broadcast.
#pragma once

// What one launch does to its rows, or to its slices of them.
enum SoftmaxPass {
  kFused,      // everything: a block has whole rows
  kReduce,     // the state of each part, to `partial`
  kNormalize,  // merges the row's partial states, then reads its parts again and writes them
};

enum SoftmaxOperand { kX, kY, kWhere, kWeight, kScale, kOut, kStat, kNumOperands };
constexpr SoftmaxOperand kGivenM = kY, kGivenL = kWeight;                       // of a state that comes in
constexpr SoftmaxOperand kLabels = kY, kGivenLse = kWeight, kRowGrad = kWhere;  // of logits (softmax/logits.cuh)

template <int kRowRank, int kColRank>
struct SoftmaxParams {
  const void* x;        // input; in the backward pass the gradient of the output
  const void* y;        // backward: the forward result; one per row: m of a state that comes in, or labels
  const void* where;    // bool, true = takes part; Acc, one per row: the gradient of the loss, null: grad_value
  const void* weight;   // Acc, logsumexp's b; one per row: l of a state that comes in, or the lse of a loss
  const void* scale;    // Acc, one per row; null: scale_value
  void* out;            // softmax, log_softmax or gradient of x
  void* stat;           // one per row: lse, loss or entropy, or m of the state; null: not wanted
  void* stat_l;         // one per row: l of the state; the lse beside a loss, null: not wanted
  void* stat_t;         // one per row: t of the state
  void* stat_logit;     // one per row: the score of the label
  void* partial;        // [rows, parts] State, between the kernels of a split row
  const void* offsets;  // [segments + 1] int or long long: ragged rows begin and end here
  double scale_value;
  double grad_value;
  long long ignore_index;  // the label of rows that do not count
  long long index_offset;  // the label of column 0
  long long label_bytes;   // 4 or 8
  long long in_part;       // of a gradient: labels that are no column are those of other parts of the row
  long long rows;
  long long cols;
  long long splits;         // blocks that share a row
  long long slice;          // columns per part; unused by selections
  long long parts;          // per row: they alone say in which order it is added up
  long long share;          // parts that a block takes, one after the other
  long long segment_width;  // ragged rows: independent columns of one segment
  long long row_size[kRowRank];
  long long col_size[kColRank];
  long long row_stride[kNumOperands][kRowRank];
  long long col_stride[kNumOperands][kColRank];

  // Whether the offset of a column is one product, which neighbouring columns share: computing it is then cheaper than
  // skipping it.
  static constexpr bool kOneProduct = kColRank == 1;

  __device__ __forceinline__ long long row_offset(SoftmaxOperand operand, long long row) const {
    return offset(row, row_size, row_stride[operand]);
  }
  __device__ __forceinline__ long long col_offset(SoftmaxOperand operand, long long col) const {
    return offset(col, col_size, col_stride[operand]);
  }

  // Of element `index` of an index space.
  template <int kRank>
  static __device__ __forceinline__ long long offset(long long index, const long long (&size)[kRank],
                                                     const long long (&stride)[kRank]) {
    long long sum = 0;
#pragma unroll
    for (int d = kRank - 1; d > 0; --d) {
      const long long quotient = index / size[d];
      sum += (index - quotient * size[d]) * stride[d];
      index = quotient;
    }
    return sum + index * stride[0];
  }
};
