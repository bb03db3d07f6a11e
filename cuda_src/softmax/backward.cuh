// The backward pass as an op of the kernels (softmax/ops.cuh says what its members are).
#pragma once

#include <softmax/ops.cuh>

// Gradient of x from the gradient g of the output and the forward result y (Milakov & Gimelshein do not give it):
//   y = softmax(scale x):      scale y (g - sum(g y))
//   y = log_softmax(scale x):  scale (g - exp(y) sum(g))
// over the elements that take part; the gradient of the others is 0, whatever g and y hold there.
template <class T, class Acc, bool kLog, bool kMasked, int kRowRank, int kColRank>
struct SoftmaxBackward {
  using State = SumState<Acc>;
  using Part = State;
  using Params = SoftmaxParams<kRowRank, kColRank>;
  static constexpr bool kReduces = false;
  static constexpr int kVec = kFragmentOf<T, T>;
  static constexpr Acc unit = 1;

  template <int kCount>
  struct Loaded {
    Packed<T, kCount> g;
    Packed<T, kCount> y;
    bool where[kCount];  // kMasked
  };

  template <int kCount>
  struct Items {
    Acc g[kCount];
    Acc y[kCount];     // probabilities, once accumulated
    unsigned present;  // bit i: element i takes part (kMasked)
  };

  const Params& params;
  const T* grad;
  const T* y;
  const bool* where;
  T* out;
  Acc scale;
  Acc sum;

  __device__ __forceinline__ SoftmaxBackward(const Params& p, long long row)
      : params(p),
        grad(static_cast<const T*>(p.x) + p.row_offset(kX, row)),
        y(static_cast<const T*>(p.y) + p.row_offset(kY, row)),
        where(static_cast<const bool*>(p.where) + (kMasked ? p.row_offset(kWhere, row) : 0)),
        out(static_cast<T*>(p.out) + p.row_offset(kOut, row)),
        scale(static_cast<Acc>(p.scale_value)) {
    if (p.scale) scale = ptx::ld_global(static_cast<const Acc*>(p.scale) + p.row_offset(kScale, row));
  }

  __device__ __forceinline__ int past_boundary() const { return elements_past_boundary<T, kVec>(grad); }

  template <bool kStreaming, int kCount, class Index>
  __device__ __forceinline__ void load(Loaded<kCount>& loaded, Index col, Index begin, Index end) const {
    if constexpr (kCount > 1) {
      loaded.g = load_fragment<kStreaming, kCount>(grad, col, begin, end);
      const bool aligned = elements_past_boundary<T, kCount>(y + col) == 0;  // y may lie otherwise than grad
      loaded.y = load_fragment<kStreaming, kCount>(y, col, begin, end, aligned);
    } else {
      loaded.g.set(0, T());
      loaded.y.set(0, T());
      if (const bool inside = col >= begin && col < end; inside || Params::kOneProduct) {
        const T *grad_ptr = grad + params.col_offset(kX, col), *y_ptr = y + params.col_offset(kY, col);
        if (inside) loaded.g.set(0, ptx::ld_global(grad_ptr));
        if (inside) loaded.y.set(0, ptx::ld_global(y_ptr));
      }
    }
    if constexpr (kMasked) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const bool inside = col + i >= begin && col + i < end;
        loaded.where[i] = inside && ptx::ld_global(where + params.col_offset(kWhere, col + i));
      }
    }
  }

  template <int kCount, class Index>
  __device__ __forceinline__ void unpack(Items<kCount>& items, const Loaded<kCount>& loaded, Index, Index,
                                         Index) const {
    items.present = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool present = !kMasked || loaded.where[i];
      items.g[i] = present ? to_acc<Acc>(loaded.g.element(i)) : Acc(0);  // zeros outside the row
      items.y[i] = present ? to_acc<Acc>(loaded.y.element(i)) : Acc(0);
      items.present |= unsigned(present) << i;
    }
  }

  template <int kGroup, int kTile, int kCount>
  __device__ __forceinline__ State accumulate(Items<kCount> (&tile)[kTile], int used, State) const {
    Acc part = 0;
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (i >= used) break;
      prepare(tile[i], {});
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        part = kLog ? part + tile[i].g[j] : ptx::fma_rn(tile[i].g[j], tile[i].y[j], part);
    }
    return {part};
  }

  template <int kCount>
  __device__ __forceinline__ void prepare(Items<kCount>& items, State) const {
    if constexpr (kLog) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) items.y[j] = from_root(exp_root(items.y[j], unit));
    }
  }

  template <bool, int kTile, int kCount>
  __device__ __forceinline__ Acc rest(const Items<kCount> (&)[kTile], int, Acc, Part = {}) const {
    return 0;
  }

  __device__ __forceinline__ void finish(Part, State total) { sum = total.sum; }

  template <int kCount>
  __device__ __forceinline__ void settle(Items<kCount>&) const {}

  template <bool kWholeWarps, int kCount, class Index>
  __device__ __forceinline__ void store(const Items<kCount>& items, Index col, Index begin, Index end) const {
    Acc value[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      value[j] = scale * (kLog ? ptx::fma_rn(-items.y[j], sum, items.g[j]) : items.y[j] * (items.g[j] - sum));
      if (kMasked && !(items.present >> j & 1)) value[j] = 0;
    }
    store_items<kWholeWarps>(params, out, col, begin, end, value);
  }

  __device__ __forceinline__ void store_stat(State, long long) const {}
};
