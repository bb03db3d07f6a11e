// Drawing elements of a row without replacement by Gumbel noise (topk/gumbel.cuh): the `num` largest z = s + noise, s =
// scale * x, in float64; of equal ones the lower index comes first. Elements of s = -inf are never drawn, and none of a
// row whose probabilities are NaN.
//
//   SampleByNoise  selects by z, of all elements or of those ahead of the row's cut
//   SampleByScore  selects by s, and draws from this list when it is complete: noise for at most 256 elements
//
// Filters keep the best elements by s, then index: the first top_k; of these the fewest whose probabilities add up to
// top_p; of these those of s >= m + log(min_p). Where a list does not hold all that is kept, topk_cut finds the last
// element of it, and SampleByNoise draws from the rows that are not finished.
//
// Both have the members of SoftmaxTopK (topk/ops.cuh).
#pragma once

#include <topk/gumbel.cuh>
#include <topk/ops.cuh>
#include <primitives/warp_list.cuh>

// row.out: log-probabilities, or scores with kOutState; null: not wanted. k: of the list.
template <int kRowRank>
struct SampleParams : TopKParams<kRowRank> {
  void* values;         // double z, laid out as the indices; null: not wanted
  const void* seed;     // unsigned long long, one per row; null: seed_value
  const void* offset;   // the same
  const void* numbers;  // long long, of each row; null: it is the row's offset by number_stride itself
  void* finished;       // WideCandidate [rows]: finished_row() or none; null: all rows are to be drawn from
  void* cut;            // WideCandidate [rows]: the last element that is kept; null: all are
  unsigned long long seed_value;
  unsigned long long offset_value;
  double top_p;      // 2: no such filter
  double log_min_p;  // -inf: no such filter
  long long num;
  long long top_k;  // cols: no such filter
  long long seed_stride[kRowRank];
  long long offset_stride[kRowRank];
  long long number_stride[kRowRank];

  __device__ __forceinline__ GumbelNoise noise(long long row_index) const {
    const auto of_row = [&](const void* given, const long long (&stride)[kRowRank], unsigned long long value) {
      const long long at = this->row.offset(row_index, this->row.row_size, stride);
      return given ? ptx::ld_global(static_cast<const unsigned long long*>(given) + at) : value;
    };
    const unsigned long long counted = this->row.offset(row_index, this->row.row_size, number_stride);
    return {of_row(seed, seed_stride, seed_value), of_row(offset, offset_stride, offset_value),
            of_row(numbers, number_stride, counted)};
  }
};

// In place of a row's cut: its draws are stored.
__device__ __forceinline__ WideCandidate finished_row() { return {~0ULL, ~0ULL}; }

template <class In, class Acc, class Candidate_, bool kMasked, int kRowRank>
struct SampleByScore : SoftmaxTopK<In, Acc, Candidate_, kMasked, kRowRank> {
  using Base = SoftmaxTopK<In, Acc, Candidate_, kMasked, kRowRank>;
  using Params = SampleParams<kRowRank>;
  using State = typename Base::State;
  static constexpr bool kSamples = true;

  const Params& params;
  GumbelNoise noise;

  __device__ __forceinline__ SampleByScore(const Params& p, long long row)
      : Base(p, row), params(p), noise(p.noise(row)) {}

  __device__ __forceinline__ Acc score(Acc t) const { return mul_rn(t, this->unit); }
  static __device__ __forceinline__ WideCandidate draw(Acc score, Acc noise, long long col) {
    return WideCandidate::make(sort_key(static_cast<double>(score) + static_cast<double>(noise), 1.0), col);
  }
  // Whether this is an element that can be drawn.
  static __device__ __forceinline__ bool is_drawn(WideCandidate candidate) {
    return candidate.key() > sort_key(-Limits<double>::infinity(), 1.0);
  }
  __device__ __forceinline__ bool is_valid(State total) const {
    const Acc m = score(total.m);
    return m - m == 0 && total.l == total.l;
  }

  // min_p: the least t that is kept.
  __device__ __forceinline__ double least(Acc m) const {
    return static_cast<double>(m) + params.log_min_p / static_cast<double>(this->unit);
  }
  // Probabilities as whole numbers: their sums depend on no order. 2^62 is more than all of them together.
  __device__ __forceinline__ unsigned long long mass(Acc t, Acc m) const {
    const Acc most = static_cast<Acc>(1ULL << (__clzll(params.row.cols) - 2));
    return static_cast<unsigned long long>(from_root(exp_root(t - m, this->unit)) * most);
  }
  // The mass that the elements kept by top_p reach.
  __device__ __forceinline__ unsigned long long wanted(double mass) const {
    return static_cast<unsigned long long>(ceil(params.top_p * mass));
  }

  __device__ __forceinline__ Acc t_of(long long col) const {
    return mul_rn(to_acc<Acc>(ptx::ld_global(this->x + params.row.col_offset(kX, col))), this->scale);
  }

  // Draw e of the row; total: its state.
  __device__ __forceinline__ void store(long long e, WideCandidate candidate, State total) const {
    const bool valid = is_valid(total), drawn = valid && is_drawn(candidate);
    const long long offset = params.result_offset(this->row, e);
    params.store_index(offset, drawn ? candidate.index() : -1);
    if (params.values) {
      const double z = drawn ? sorted_value(candidate.key(), 1.0) : -Limits<double>::infinity();
      ptx::st_global(static_cast<double*>(params.values) + offset, z);
    }
    if (!params.row.out) return;
    Acc value = -Limits<Acc>::infinity();
    if (drawn) {
      const Acc t = t_of(candidate.index());
      const bool state = params.output == kOutState;
      value = state ? score(t) : ptx::fma_rn(t - total.m, this->unit, -log_natural(total.l));
    } else if (params.output != kOutState && !valid && !(kMasked && score(total.m) == value && total.l == total.l)) {
      value = Limits<Acc>::nan();
    }
    ptx::st_global(static_cast<Acc*>(params.row.out) + offset, value);
  }

  // After the first `drawn` draws: there are no more. A whole warp calls it.
  __device__ __forceinline__ void finish(long long drawn, State total) const {
    const int lane = threadIdx.x % 32;
    for (long long e = drawn + lane; e < params.num; e += 32) store(e, WideCandidate::none(), total);
    if (lane == 0 && params.row.stat) this->store_stat(total, this->row);
  }

  // The draws of a row from its list, one after the other; a whole warp calls it.
  template <int kPerLane>
  __device__ __forceinline__ void store_draws(const Candidate_ (&best)[kPerLane], State total) const {
    using Mass = unsigned long long;
    const int lane = threadIdx.x % 32;
    const bool valid = is_valid(total);

    // The mass of the elements before each.
    Acc t[kPerLane];
    Mass before[kPerLane], sum = 0;
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) {
      const bool found = valid && r * 32 + lane < params.k && !best[r].is_none();
      t[r] = found ? sorted_value(best[r].key(), Acc(1)) : -Limits<Acc>::infinity();
      const Mass own = found ? mass(t[r], total.m) : 0, reached = sum_up_to_lane(own);
      before[r] = sum + reached - own;
      sum += __shfl_sync(0xffffffff, reached, 31);
    }
    // Without top_k all elements of the row count, not only those of the list.
    const bool all = params.k >= params.top_k;
    const Mass wanted = !valid ? 0 : this->wanted(all ? static_cast<double>(sum) : total.l * mass(total.m, total.m));

    const double least = this->least(total.m);
    WideCandidate kept[kPerLane];
    bool ended = false;  // by min_p
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) {
      ended |= r * 32 + lane < params.k && !(t[r] >= least);
      kept[r] = WideCandidate::none();
      if (score(t[r]) > -Limits<Acc>::infinity() && before[r] < wanted && t[r] >= least) {
        const long long col = best[r].index();
        kept[r] = draw(score(t[r]), noise.of(params.index_offset + col), col);
      }
    }
    long long e = 0;
    for (; e < params.num; ++e) {
      WideCandidate first = kept[0];
#pragma unroll
      for (int r = 1; r < kPerLane; ++r) first.replace(kept[r].beats(first), kept[r]);
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) {
        const WideCandidate other = first.shuffle_xor(mask);
        first.replace(other.beats(first), other);
      }
      if (first.is_none()) break;
      if (lane == e % 32) store(e, first, total);
#pragma unroll
      for (int r = 0; r < kPerLane; ++r) kept[r].replace(!first.beats(kept[r]), WideCandidate::none());
    }
    finish(e, total);
    const bool complete = all || sum >= wanted || __any_sync(0xffffffff, ended);
    if (lane == 0 && params.finished) {
      ptx::st_global(static_cast<WideCandidate*>(params.finished) + this->row,
                     complete ? finished_row() : WideCandidate::none());
    }
  }
};

template <class In, class Acc, bool kMasked, int kRowRank>
struct SampleByNoise : SampleByScore<In, Acc, WideCandidate, kMasked, kRowRank> {
  using Base = SampleByScore<In, Acc, WideCandidate, kMasked, kRowRank>;
  using Params = SampleParams<kRowRank>;
  using Candidate = WideCandidate;
  using Key = Candidate::Key;
  using State = typename Base::State;
  using Ordered = double;
  template <int kCount>
  using Items = typename Base::template Items<kCount>;  // w: the noise, -inf of what cannot be selected

  Candidate cut;  // by t

  __device__ __forceinline__ SampleByNoise(const Params& p, long long row)
      : Base(p, row), cut(p.cut ? ptx::ld_global(static_cast<const Candidate*>(p.cut) + row) : Candidate::none()) {}

  __device__ __forceinline__ bool is_wanted() const { return cut.key() != finished_row().key(); }

  static __device__ __forceinline__ Key nothing() { return sort_key(-Limits<double>::infinity(), 1.0); }

  // The noise of an element with this word, if it is ahead of the cut.
  __device__ __forceinline__ Acc noise_of(unsigned int word, Acc t, long long col) const {
    if (cut.beats(Candidate::make(sort_key(t, Acc(1)), col))) return -Limits<Acc>::infinity();
    return gumbel(word);
  }

  template <int kCount>
  __device__ __forceinline__ void add_noise(Items<kCount>& items, long long col) const {
    unsigned int word[kCount];
    this->noise.draw(word, this->params.index_offset + col);
#pragma unroll
    for (int j = 0; j < kCount; ++j) items.w[j] = noise_of(word[j], items.t[j], col + j);
  }

  // No word is drawn where no noise can take an element of a lane's to the k-th, and no noise is computed of words
  // whose noise cannot.
  template <int kTile, int kCount>
  __device__ __forceinline__ Key examine(Items<kCount> (&tile)[kTile], int used, State& total, long long first_col,
                                         int step, Candidate kth) const {
    const Acc t = this->largest(tile, kTile, -Limits<Acc>::infinity());
    total = total.extend(this->sum_at(max_number(total.m, t), tile, used), this->unit);
    bool any = true;
    unsigned int last = 0xffffffff;
    if (!kth.is_none()) {
      const Acc z = static_cast<Acc>(sorted_value(kth.key(), 1.0));
      last = last_word_to_reach(static_cast<float>(z - this->score(t) - Acc(fabs(z)) * Acc(0x1p-22)), any);
    }
    if (!__any_sync(0xffffffff, any)) return nothing();
    unsigned int word[kTile][kCount], first = 0xffffffff;
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      this->noise.draw(word[i], this->params.index_offset + first_col + i * step);
#pragma unroll
      for (int j = 0; j < kCount; ++j) first = min(first, word[i][j]);
    }
    if (!__any_sync(0xffffffff, any && first <= last)) return nothing();
    Key best = nothing();
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        tile[i].w[j] = -Limits<Acc>::infinity();
        if (word[i][j] <= last) tile[i].w[j] = noise_of(word[i][j], tile[i].t[j], first_col + i * step + j);
        best = max(best, candidate(tile[i], j, 0).key());
      }
    }
    return best;
  }

  template <int kCount>
  __device__ __forceinline__ Candidate candidate(const Items<kCount>& items, int j, long long col) const {
    return this->draw(this->score(items.t[j]), items.w[j], col);
  }

  // The draws of a row: its list; a whole warp calls it.
  template <int kPerLane>
  __device__ __forceinline__ void store_draws(const Candidate (&best)[kPerLane], State total) const {
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) {
      const int e = r * 32 + static_cast<int>(threadIdx.x % 32);
      if (e < this->params.num) this->store(e, best[r], total);
    }
    this->finish(32 * kPerLane, total);
  }
};
