// What the selection kernels do to a row, apart from how they walk over it: TopK, and SoftmaxTopK, which keeps the
// row's softmax state beside the selection.
//
// Both load as SoftmaxForward does, and have these members beyond load, unpack and accumulate (softmax/ops.cuh):
//   best        the largest key of a tile of items, without NaN; nothing() where there is no number
//   examine     best, and the tile's part of the state, with the tile's maximum taken once; of what cannot beat the
//   k-th,
//               it need not look closer
//   candidate   element j of an item
//   selected    the state of one selected element
//   add_noise   what candidates need beyond items, in kernels that do not call `examine`
//   is_wanted   whether the row is to be read
//   store       result e of the row, after selection; norm: the state that probabilities are relative to
//   store_row   the results per row: lse or state
#pragma once

#include <softmax/ops.cuh>
#include <primitives/candidate.cuh>

enum TopKOutput { kOutProb, kOutLogProb, kOutLogit, kOutState };

template <int kRowRank>
struct TopKParams {
  SoftmaxParams<kRowRank, 1> row;  // out: the values; stat, stat_l: lse, or m and l; scale_value is 1 or -1 in TopK
  void* indices;                   // long long, laid out as the values
  void* lists;                     // Candidate [rows, splits, k], between the kernels of a split row
  long long k;
  long long index_offset;  // added to every index
  long long output;        // TopKOutput
  long long renormalize;   // probabilities of the selected elements among themselves

  __device__ __forceinline__ long long result_offset(long long row_index, long long e) const {
    return row.row_offset(kOut, row_index) + e * row.col_stride[kOut][0];
  }
  __device__ __forceinline__ void store_index(long long offset, long long index) const {
    ptx::st_global(static_cast<long long*>(indices) + offset, index < 0 ? index : index + index_offset);
  }
};

// A plain selection keeps no state.
struct NoState {
  static __device__ __forceinline__ NoState identity() { return {}; }
  template <class Acc>
  __device__ __forceinline__ NoState extend(NoState, Acc) const {
    return {};
  }
  template <class Acc>
  __device__ __forceinline__ NoState merge(NoState, Acc) const {
    return {};
  }
  template <int kGroup, int kStride = 1, class Acc>
  __device__ __forceinline__ NoState merge_group(Acc) const {
    return {};
  }
};

// The k largest elements (scale_value 1) or the k smallest (-1).
template <class In, class Value_, class Candidate_, int kRowRank>
struct TopK : SoftmaxForward<In, Value_, In, kState, false, false, kRowRank, 1> {
  using Base = SoftmaxForward<In, Value_, In, kState, false, false, kRowRank, 1>;
  using Params = TopKParams<kRowRank>;
  using Value = Value_;
  using Candidate = Candidate_;
  using Key = typename Candidate::Key;
  using State = NoState;
  using Ordered = In;  // what keys tell apart
  static constexpr bool kSamples = false;

  template <int kCount>
  struct Items {
    Key key[kCount];
  };

  const Params& params;
  long long row;

  __device__ __forceinline__ TopK(const Params& p, long long row) : Base(p.row, row), params(p), row(row) {}

  // Elements outside have the key 0.
  template <int kCount, class Index>
  __device__ __forceinline__ void unpack(Items<kCount>& items, const typename Base::template Loaded<kCount>& loaded,
                                         Index col, Index begin, Index end) const {
    const bool whole = col >= begin && col + kCount <= end;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const bool inside = whole || (col + j >= begin && col + j < end);
      items.key[j] = inside ? sort_key(to_acc<Value>(loaded.x.element(j)), this->scale) : 0;
    }
  }

  template <int kGroup, int kTile, int kCount>
  __device__ __forceinline__ State accumulate(const Items<kCount> (&)[kTile], int, State) const {
    return {};
  }

  template <int kTile, int kCount>
  __device__ __forceinline__ Key examine(const Items<kCount> (&tile)[kTile], int, State&, long long, int,
                                         Candidate) const {
    return best(tile);
  }

  static __device__ __forceinline__ Key nothing() { return 0; }

  template <int kTile, int kCount>
  __device__ __forceinline__ Key best(const Items<kCount> (&tile)[kTile]) const {
    Key key = nothing();
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) key = max(key, tile[i].key[j]);
    }
    return key;
  }

  template <int kCount>
  __device__ __forceinline__ Candidate candidate(const Items<kCount>& items, int j, long long col) const {
    return Candidate::make(items.key[j], col);
  }

  template <int kCount>
  __device__ __forceinline__ void add_noise(Items<kCount>&, long long) const {}
  __device__ __forceinline__ bool is_wanted() const { return true; }

  __device__ __forceinline__ State selected(Candidate) const { return {}; }

  __device__ __forceinline__ void store(long long e, Candidate candidate, State) const {
    const Value value = sorted_value<Value>(candidate.key(), this->scale);
    In result = from_acc<In>(value);
    // A key tells neither the sign of a zero nor the payload of a NaN.
    if (!(value > 0) && !(value < 0)) {
      result = ptx::ld_global(this->x + params.row.col_offset(kX, candidate.index()));
    }
    const long long offset = params.result_offset(row, e);
    ptx::st_global(static_cast<In*>(params.row.out) + offset, result);
    params.store_index(offset, candidate.index());
  }

  __device__ __forceinline__ void store_row(State) const {}
};

// Milakov & Gimelshein, arXiv:1805.02867, algorithm 4, ordered by t = scale * x as it is rounded. An element that the
// mask takes out counts as -inf.
template <class In, class Acc, class Candidate_, bool kMasked, int kRowRank>
struct SoftmaxTopK : SoftmaxForward<In, Acc, In, kState, kMasked, false, kRowRank, 1> {
  using Base = SoftmaxForward<In, Acc, In, kState, kMasked, false, kRowRank, 1>;
  using Params = TopKParams<kRowRank>;
  using Candidate = Candidate_;
  using Key = typename Candidate::Key;
  using State = typename Base::State;
  using Ordered = Acc;
  static constexpr bool kSamples = false;
  template <int kCount>
  using Items = typename Base::template Items<kCount>;

  const Params& params;
  long long row;

  __device__ __forceinline__ SoftmaxTopK(const Params& p, long long row) : Base(p.row, row), params(p), row(row) {}

  static __device__ __forceinline__ Key nothing() { return sort_key(-Limits<Acc>::infinity(), Acc(1)); }

  // Over the numbers of the tile: a NaN is selected only while fewer than k numbers are known, and then any key passes.
  template <int kTile, int kCount>
  __device__ __forceinline__ Key best(const Items<kCount> (&tile)[kTile]) const {
    return sort_key(this->largest(tile, kTile, -Limits<Acc>::infinity()), Acc(1));
  }

  template <int kTile, int kCount>
  __device__ __forceinline__ Key examine(Items<kCount> (&tile)[kTile], int used, State& total, long long, int,
                                         Candidate) const {
    const Acc t = this->largest(tile, kTile, -Limits<Acc>::infinity());
    total = total.extend(this->sum_at(max_number(total.m, t), tile, used), this->unit);
    return sort_key(t, Acc(1));
  }

  template <int kCount>
  __device__ __forceinline__ Candidate candidate(const Items<kCount>& items, int j, long long col) const {
    return Candidate::make(sort_key(items.t[j], Acc(1)), col);
  }

  template <int kCount>
  __device__ __forceinline__ void add_noise(Items<kCount>&, long long) const {}
  __device__ __forceinline__ bool is_wanted() const { return true; }

  __device__ __forceinline__ State selected(Candidate candidate) const {
    if (candidate.is_none()) return State::identity();
    const Acc t = sorted_value<Acc>(candidate.key(), Acc(1));
    return {t, exp_natural(t - shift_of(t))};
  }

  __device__ __forceinline__ void store(long long e, Candidate candidate, State norm) const {
    const bool none = candidate.is_none();
    const Acc infinity = Limits<Acc>::infinity();
    const Acc t = none ? -infinity : sorted_value<Acc>(candidate.key(), Acc(1));
    const Acc score = mul_rn(t, this->unit);
    const long long offset = params.result_offset(row, e);
    params.store_index(offset, none ? -1 : candidate.index());
    if (params.output == kOutState) {
      ptx::st_global(static_cast<Acc*>(params.row.out) + offset, score);
      return;
    }
    Acc value = score;
    if (params.output == kOutProb) {
      value = norm.m == infinity ? Limits<Acc>::nan() : from_root(exp_root(t - norm.m, this->unit)) / norm.l;
    } else if (params.output == kOutLogProb) {
      value = ptx::fma_rn(t - norm.m, this->unit, -log_natural(norm.l));
    }
    if (kMasked && t == -infinity && !ptx::ld_global(this->where + params.row.col_offset(kWhere, candidate.index()))) {
      value = params.output == kOutProb ? Acc(0) : -infinity;
    }
    ptx::st_global(static_cast<In*>(params.row.out) + offset, from_acc<In>(value));
  }

  __device__ __forceinline__ void store_row(State total) const {
    if (params.output == kOutState) {
      this->store_stat(total, row);
    } else if (params.row.stat) {
      ptx::st_global(static_cast<Acc*>(params.row.stat) + params.row.row_offset(kStat, row), total.lse(this->unit));
    }
  }
};

// The k results of a row, and its lse or state; a whole warp calls it, with the row's list (primitives/warp_list.cuh)
// and state.
template <class Op, int kPerLane>
__device__ __forceinline__ void store_selection(const Op& op, const typename Op::Candidate (&best)[kPerLane],
                                                typename Op::State total) {
  if constexpr (Op::kSamples) {
    op.store_draws(best, total);
  } else {
    const int lane = threadIdx.x % 32;
    typename Op::State norm = total;
    if (op.params.renormalize) {
      norm = Op::State::identity();
#pragma unroll
      for (int r = 0; r < kPerLane; ++r) {
        if (r * 32 + lane < op.params.k) norm = norm.merge(op.selected(best[r]), op.unit);
      }
      norm = norm.template merge_group<32>(op.unit);
    }
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) {
      if (r * 32 + lane < op.params.k) op.store(r * 32 + lane, best[r], norm);
    }
    if (lane == 0) op.store_row(total);
  }
}
