// Rows of logits t = scale * x with a label each, as ops of the kernels (softmax/ops.cuh says what their members are).
//
//   loss      lse - t[label] = log(l) + (m - t[label])
//   gradient  scale * grad * (exp(t - lse) - [column is label])
//   state     m, l, the sum of exp(t - m) (t - m), and t[label]
//
// A label that is no column has a loss, a gradient and a score of NaN, and nothing is read at it; where columns are a
// part of the row it takes nothing off the gradient. A row whose label is ignored has a loss and a gradient of 0,
// whatever it holds.
#pragma once

#include <softmax/ops.cuh>

// The label of a row as a column: at least `cols`, where it is none.
template <class Params>
__device__ __forceinline__ unsigned long long load_label(const Params& params, long long row, bool* ignored) {
  const long long at = params.row_offset(kLabels, row);
  const long long label = params.label_bytes == 4 ? ptx::ld_global(static_cast<const int*>(params.y) + at)
                                                  : ptx::ld_global(static_cast<const long long*>(params.y) + at);
  *ignored = label == params.ignore_index;
  return static_cast<unsigned long long>(label) - static_cast<unsigned long long>(params.index_offset);
}

// kResult: kLoss or kLogits.
template <class In, class Acc, SoftmaxResult kResult, int kRowRank>
struct LogitsForward : SoftmaxForward<In, Acc, Acc, kResult, false, false, kRowRank, 1> {
  using Base = SoftmaxForward<In, Acc, Acc, kResult, false, false, kRowRank, 1>;
  using Params = SoftmaxParams<kRowRank, 1>;

  unsigned long long label;  // loaded before the row is, used after it
  bool ignored;

  __device__ __forceinline__ LogitsForward(const Params& p, long long row)
      : Base(p, row), label(load_label(p, row, &ignored)) {}

  template <class State_>
  __device__ __forceinline__ void store_stat(State_ total, long long row) const {
    const Params& params = this->params;
    const Acc unit = this->unit;
    Acc t = Limits<Acc>::nan();  // of the label
    if (label < static_cast<unsigned long long>(params.cols)) {
      t = mul_rn(to_acc<Acc>(ptx::ld_global(this->x + params.col_offset(kX, label))), this->scale);
    }
    const long long offset = params.row_offset(kStat, row);
    const auto store = [offset](void* stat, Acc value) { ptx::st_global(static_cast<Acc*>(stat) + offset, value); };
    if constexpr (kResult == kLoss) {
      store(params.stat, ignored ? Acc(0) : ptx::fma_rn(total.m - t, unit, total.log_sum()));
      if (params.stat_l) store(params.stat_l, total.lse(unit));
    } else {
      const Acc m = total.l == total.l ? mul_rn(total.m, unit) : total.l;  // a NaN in the row shows in all three
      store(params.stat, m);
      store(params.stat_l, total.l);
      store(params.stat_t, m - m == 0 ? mul_rn(total.t, unit) : total.l);
      store(params.stat_logit, mul_rn(t, unit));
    }
  }
};

// The gradient of the loss as an op of softmax_with_state: the lse is what is known of a row.
template <class T, class Acc, int kRowRank>
struct LossBackward : SoftmaxForward<T, Acc, T, kProb, false, false, kRowRank, 1> {
  using Base = SoftmaxForward<T, Acc, T, kProb, false, false, kRowRank, 1>;
  using Params = SoftmaxParams<kRowRank, 1>;

  unsigned long long label;
  bool skipped;  // ignored
  Acc grad;      // of the loss; NaN where the row has no gradient

  __device__ __forceinline__ LossBackward(const Params& p, long long row)
      : Base(p, row), label(load_label(p, row, &skipped)) {}

  // A maximum of lse, in units, and a sum of 1.
  template <class Stat>
  __device__ __forceinline__ SoftmaxState<Acc> load_given(long long row) {
    const Params& params = this->params;
    const Stat lse = ptx::ld_global(static_cast<const Stat*>(params.weight) + params.row_offset(kGivenLse, row));
    grad = static_cast<Acc>(params.grad_value);
    if (params.where) grad = ptx::ld_global(static_cast<const Acc*>(params.where) + params.row_offset(kRowGrad, row));
    const bool known = params.in_part || label < static_cast<unsigned long long>(params.cols);
    if (!(lse - lse == 0) || !known) grad = Limits<Acc>::nan();
    return {static_cast<Acc>(lse / static_cast<Stat>(this->unit)), Acc(1)};
  }

  template <class State_>
  __device__ __forceinline__ void finish(State_, State_) {}

  template <bool kWholeWarps, int kCount, class Index>
  __device__ __forceinline__ void store(const typename Base::template Items<kCount>& items, Index col, Index begin,
                                        Index end) const {
    const unsigned long long beyond = label - static_cast<unsigned long long>(col);
    const int at = beyond < kCount ? static_cast<int>(beyond) : -1;  // which of these elements the label is
    const Acc scale = mul_rn(this->scale, this->unit);
    Acc value[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const Acc p = from_root(items.t[j]);
      value[j] = skipped ? Acc(0) : scale * (grad * (j == at ? p - Acc(1) : p));
    }
    store_items<kWholeWarps>(this->params, this->out, col, begin, end, value);
  }
};
