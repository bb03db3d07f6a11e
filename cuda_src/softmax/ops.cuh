// What the kernels do to a row, apart from how they walk over it: SoftmaxForward, and SoftmaxBackward of
// softmax/backward.cuh.
//
// Every op has the same members. A thread holds elements as Items<kCount> (one fragment of a contiguous row, or one
// element of a strided one: kCount = 1) and their reduction as a State:
//   load        elements of the row as they lie in memory, into Loaded<kCount>: nothing waits for them
//   unpack      the same as Items; what is outside or masked counts for nothing
//   accumulate  the Part of a tile of items: tile maximum first, then one exponential per element
//   rest        the sum of a tile without the row's maximum, where State is RestState
//   finish      takes the reduction of the whole row
//   settle      what items need between finish and the first store
//   prepare     after finish, does to fresh items what accumulate and settle would have done
//   store       the results of items, after finish
//   store_stat  the row's lse, entropy or state
//   unit        of its scores (softmax_state.cuh)
//   kReduces    whether the only results of a row are its stats
#pragma once

#include <softmax/params.cuh>
#include <primitives/softmax_state.cuh>
#include <primitives/vector.cuh>

// kProbLse: both probabilities and lse. From kLse on: of a row, not of its elements; the last two are those of LogitsOp
// (softmax/logits.cuh).
enum SoftmaxResult { kProb, kProbLse, kLogProb, kLse, kState, kEntropy, kLoss, kLogits };

template <class A, class B>
constexpr int kFragmentOf = 16 / (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

// Results of one fragment of a contiguous row, or of one element of a strided one.
template <bool kWholeWarps, int kCount, class Params, class Out, class Acc, class Index>
__device__ __forceinline__ void store_items(const Params& params, Out* out, Index col, Index begin, Index end,
                                            const Acc (&value)[kCount]) {
  if constexpr (kCount > 1) {
    store_fragment<kWholeWarps>(out, col, begin, end, value);
  } else if (const bool inside = col >= begin && col < end; inside || Params::kOneProduct) {
    Out* ptr = out + params.col_offset(kOut, col);
    if (inside) ptx::st_global_streaming(ptr, from_acc<Out>(value[0]));
  }
}

// Items from first_col on, kStep columns apart: all loads are in flight before the first is waited for.
template <bool kStreaming, int kStep, int kCount, int kTile, class Op, class Index>
__device__ __forceinline__ void load_tile(const Op& op, typename Op::template Items<kCount> (&items)[kTile],
                                          Index first_col, Index begin, Index end) {
  typename Op::template Loaded<kCount> loaded[kTile];
#pragma unroll
  for (int i = 0; i < kTile; ++i) op.template load<kStreaming>(loaded[i], first_col + i * kStep, begin, end);
#pragma unroll
  for (int i = 0; i < kTile; ++i) op.unpack(items[i], loaded[i], first_col + i * kStep, begin, end);
}

// The state that a result needs. Only the logarithm of a sum needs more than the sum.
template <class Acc, SoftmaxResult kResult, bool kWeighted>
struct StateFor {
  using Type = typename Select<kResult == kProb || kResult == kState, SoftmaxState<Acc>, RestState<Acc>>::Type;
};
template <class Acc>
struct StateFor<Acc, kLse, true> {
  using Type = WeightedState<Acc>;
};
template <class Acc>
struct StateFor<Acc, kEntropy, false> {
  using Type = TiltedState<RestState<Acc>>;
};
template <class Acc>
struct StateFor<Acc, kLogits, false> {
  using Type = TiltedState<SoftmaxState<Acc>>;
};

// softmax, log_softmax, logsumexp (with weights b), softmax_state and entropy of t = scale * x.
template <class In, class Acc, class Out, SoftmaxResult kResult, bool kMasked, bool kWeighted, int kRowRank,
          int kColRank>
struct SoftmaxForward {
  using State = typename StateFor<Acc, kResult, kWeighted>::Type;
  using Part = typename State::Part;
  using Params = SoftmaxParams<kRowRank, kColRank>;
  static constexpr bool kProbs = kResult == kProb || kResult == kProbLse;
  static constexpr bool kReduces = kResult >= kLse;
  static constexpr bool kTilted = kResult == kEntropy || kResult == kLogits;
  static constexpr bool kHasMask = kMasked;
  static constexpr int kVec = !kReduces ? kFragmentOf<In, Out> : kFragmentOf<In, In>;
  static constexpr bool skipped = false;  // whether no element of the row needs to be read
  static_assert(!kWeighted || kResult == kLse, "only logsumexp has weights");

  template <int kCount>
  struct Loaded {
    Packed<In, kCount> x;
    Acc w[kCount];       // kWeighted
    bool where[kCount];  // kMasked
  };

  template <int kCount>
  struct Items {
    Acc t[kCount];     // scaled elements; exponentials (exp_root) once accumulated, if probabilities are wanted
    Acc w[kCount];     // weights (kWeighted)
    unsigned present;  // bit i: element i takes part (kMasked)
  };

  const Params& params;
  const In* x;
  const bool* where;
  const Acc* weight;
  Out* out;
  Acc scale;          // times unit
  Acc unit;           // of t
  Acc shift, factor;  // after finish: probabilities are e^t * factor, their logarithms (t - shift) * unit - factor

  __device__ __forceinline__ SoftmaxForward(const Params& p, long long row)
      : params(p),
        x(static_cast<const In*>(p.x) + p.row_offset(kX, row)),
        where(static_cast<const bool*>(p.where) + (kMasked ? p.row_offset(kWhere, row) : 0)),
        weight(static_cast<const Acc*>(p.weight) + (kWeighted ? p.row_offset(kWeight, row) : 0)),
        out(static_cast<Out*>(p.out) + p.row_offset(kOut, row)) {
    Acc whole = static_cast<Acc>(p.scale_value);
    if (p.scale) whole = ptx::ld_global(static_cast<const Acc*>(p.scale) + p.row_offset(kScale, row));
    const ScaleParts<Acc> parts = parts_of_scale(whole);
    scale = parts.factor;
    unit = parts.unit;
  }

  __device__ __forceinline__ int past_boundary() const { return elements_past_boundary<In, kVec>(x); }

  template <bool kStreaming, int kCount, class Index>
  __device__ __forceinline__ void load(Loaded<kCount>& loaded, Index col, Index begin, Index end) const {
    if constexpr (kCount > 1) {
      loaded.x = load_fragment<kStreaming, kCount>(x, col, begin, end);
    } else if (const bool inside = col >= begin && col < end; inside || Params::kOneProduct) {
      const In* ptr = x + params.col_offset(kX, col);
      if (inside) loaded.x.set(0, kStreaming ? ptx::ld_global_streaming(ptr) : ptx::ld_global(ptr));
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool inside = col + i >= begin && col + i < end;
      if constexpr (kMasked) {
        loaded.where[i] = inside && ptx::ld_global(where + params.col_offset(kWhere, col + i));
      }
      if constexpr (kWeighted) {
        // Neighbours are one stride apart (one element alone where columns have several dimensions).
        const Acc* ptr = inside || Params::kOneProduct ? weight + params.col_offset(kWeight, col) : weight;
        loaded.w[i] = inside ? ptx::ld_global(ptr + i * params.col_stride[kWeight][0]) : Acc(0);
      }
    }
  }

  template <int kCount, class Index>
  __device__ __forceinline__ void unpack(Items<kCount>& items, const Loaded<kCount>& loaded, Index col, Index begin,
                                         Index end) const {
    if (!kMasked && !kWeighted && col >= begin && col + kCount <= end) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) items.t[i] = mul_rn(to_acc<Acc>(loaded.x.element(i)), scale);
      return;
    }
    items.present = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      bool present = col + i >= begin && col + i < end;
      if constexpr (kMasked) present = loaded.where[i];
      if constexpr (kWeighted) {
        items.w[i] = !kMasked || present ? loaded.w[i] : Acc(0);
        present = items.w[i] != 0;  // b = 0 takes out an inf or a NaN, too
      }
      items.t[i] = present ? mul_rn(to_acc<Acc>(loaded.x.element(i)), scale) : -Limits<Acc>::infinity();
      items.present |= unsigned(present) << i;
    }
  }

  // The largest of the first `used` items, at least `m`. An entropy is 0 where nothing takes part, which m = -inf says;
  // an element of -inf that does raises m to the least number, with a sum of 0.
  template <int kTile, int kCount>
  __device__ __forceinline__ Acc largest(const Items<kCount> (&tile)[kTile], int used, Acc m) const {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (i >= used) break;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        m = max_number(m, tile[i].t[j]);
        if (kResult == kEntropy && kMasked && tile[i].present >> j & 1) m = max_number(m, -Limits<Acc>::most());
      }
    }
    return m;
  }

  // The sum of the first `used` items, its m at least `floor.m` and equal over groups of kGroup lanes.
  template <int kGroup, int kTile, int kCount>
  __device__ __forceinline__ Part accumulate(Items<kCount> (&tile)[kTile], int used, Part floor) const {
    return sum_at(group_max<kGroup>(largest(tile, used, floor.m)), tile, used);
  }

  // The same relative to `m`, which no item exceeds.
  template <int kTile, int kCount>
  __device__ __forceinline__ Part sum_at(Acc m, Items<kCount> (&tile)[kTile], int used) const {
    Acc l = 0, w = 0, tilt = 0;
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (i >= used) break;
      Acc sum = 0;  // of a fragment: short sums round less
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if constexpr (kWeighted) {
          const bool is_most = tile[i].t[j] == m;
          const Acc root = exp_root(is_most ? Acc(0) : tile[i].t[j] - m, unit), b = tile[i].w[j];
          w += is_most ? b : Acc(0);
          sum = add_times_from_root(sum, is_most ? Acc(0) : b, root);
        } else {
          const Acc d = tile[i].t[j] - shift_of(m), root = exp_root(d, unit);
          sum = j == 0 ? from_root(root) : add_from_root(sum, root);
          if constexpr (kTilted) tilt = add_tilted(tilt, from_root(root), d);
          if constexpr (kProbs) tile[i].t[j] = root;
        }
      }
      l = i == 0 ? sum : l + sum;
    }
    if constexpr (kWeighted)
      return {m, w, l};
    else if constexpr (kTilted)
      return {{m, l}, tilt};
    else
      return {m, l};
  }

  // What the first `used` items add to a sum relative to m, which is finite, leaving out the one that equals m.
  // kAccumulated: they went through accumulate, which gave `part`.
  template <bool kAccumulated, int kTile, int kCount>
  __device__ __forceinline__ Acc rest(const Items<kCount> (&tile)[kTile], int used, Acc m, Part part = {}) const {
    constexpr bool kRoots = kAccumulated && kProbs;
    Acc sum = 0;
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (i >= used) break;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const Acc t = tile[i].t[j], root = kRoots ? t : exp_root(t - m, unit);
        if (kRoots ? t != 1 || part.m != m : t != m) sum = add_from_root(sum, root);
      }
    }
    return kRoots ? rescaled_sum(sum, part.m, m, unit) : sum;
  }

  // The state of a whole row that comes in, in units of `unit`: its m is an exact multiple, as every t is.
  template <class Stat>
  __device__ __forceinline__ SoftmaxState<Acc> load_given(long long row) const {
    const Stat m = ptx::ld_global(static_cast<const Stat*>(params.y) + params.row_offset(kGivenM, row));
    const Stat l = ptx::ld_global(static_cast<const Stat*>(params.weight) + params.row_offset(kGivenL, row));
    return {static_cast<Acc>(m / static_cast<Stat>(unit)), static_cast<Acc>(l)};
  }

  template <int kCount, class State_>
  __device__ __forceinline__ void prepare(Items<kCount>& items, State_ total) const {
    if constexpr (kProbs) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) items.t[j] = exp_root(items.t[j] - shift_of(total.m), unit);
    } else {
      settle(items);
    }
  }

  // `part`: the state whose m the items' exponentials are relative to; `total`: the whole row's.
  template <class Part_, class State_>
  __device__ __forceinline__ void finish(Part_ part, State_ total) {
    shift = total.m;  // where it is infinite, factor makes NaN or -inf of everything
    if constexpr (kProbs) {
      factor = from_root(exp_root(part.m - shift, unit)) / total.sum();
      if (total.m == Limits<Acc>::infinity()) factor = Limits<Acc>::nan();  // exp(inf - inf)
    } else if constexpr (kResult == kLogProb) {
      factor = total.log_sum();
    }
  }

  // In place and before the first store, else 64 elements would take 128 registers.
  template <int kCount>
  __device__ __forceinline__ void settle(Items<kCount>& items) const {
    if constexpr (kResult == kLogProb) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) items.t[j] -= shift;
    }
  }

  template <bool kWholeWarps, int kCount, class Index>
  __device__ __forceinline__ void store(const Items<kCount>& items, Index col, Index begin, Index end) const {
    Acc value[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      value[j] = kProbs ? times_from_root(factor, items.t[j]) : ptx::fma_rn(items.t[j], unit, -factor);
      if (kMasked && !(items.present >> j & 1)) value[j] = kProbs ? Acc(0) : -Limits<Acc>::infinity();
    }
    store_items<kWholeWarps>(params, out, col, begin, end, value);
  }

  template <class State_>
  __device__ __forceinline__ void store_stat(State_ total, long long row) const {
    const long long offset = params.row_offset(kStat, row);
    if constexpr (kResult == kLse) {
      ptx::st_global(static_cast<Out*>(params.stat) + offset, from_acc<Out>(total.lse(unit)));
    } else if constexpr (kResult == kState) {
      const Acc m = total.l == total.l ? mul_rn(total.m, unit) : total.l;  // a NaN in the row shows in both
      ptx::st_global(static_cast<Acc*>(params.stat) + offset, m);
      ptx::st_global(static_cast<Acc*>(params.stat_l) + offset, total.l);
    } else if constexpr (kResult == kEntropy) {
      const bool nothing = kMasked && total.m == -Limits<Acc>::infinity();
      ptx::st_global(static_cast<Acc*>(params.stat) + offset, nothing ? Acc(0) : total.entropy(unit));
    } else if constexpr (kResult == kProbLse) {
      ptx::st_global(static_cast<Acc*>(params.stat) + offset, total.lse(unit));
    }
  }
};
