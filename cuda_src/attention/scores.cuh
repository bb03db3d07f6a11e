// Which keys a query sees, and how its scores change before the softmax.
//
//   s = scale (q k)  ->  softcap tanh(s / softcap)  ->  + bias  ->  - slope |i + offset - j|  ->  Score  ->  masks
#pragma once

#include <attention/params.cuh>
#include <primitives/numeric.cuh>
#include <ptx/memory.cuh>

struct NoBias {};

// In the place of a score expression, which is a struct of its own behind the kernel's header:
//   template <class Acc> static Acc score(Acc s, long long b, long long h, long long q, long long k,
//                                         const ScoreArrays& arrays);  // for gradients also Acc& chain: ds'/ds
// b: sequence, h: query head, q, k: places of query and key among the keys.
struct NoScore {};

// Exponentials of scores: base 2 in float32, which has an instruction for it, base e in float64. e^x is exp(x kUnit),
// and exp(x) is e^(x kNatural).
template <class Acc>
struct ScoreBase;
template <>
struct ScoreBase<float> {
  static constexpr float kUnit = 1.4426950408889634f, kNatural = 0.6931471805599453f;
  static constexpr float kLinear = 1.0f / (1 << 12);  // up to here tanh x rounds to x
  static __device__ __forceinline__ float exp(float x) { return ptx::exp2_approx(x); }
  static __device__ __forceinline__ float inverse(float x) { return ptx::rcp_approx(x); }
};
template <>
struct ScoreBase<double> {
  static constexpr double kUnit = 1, kNatural = 1;
  static constexpr double kLinear = 1.0 / (1 << 27);
  static __device__ __forceinline__ double exp(double x) { return ptx::exp_f64(x); }
  static __device__ __forceinline__ double inverse(double x) { return 1 / x; }
};

// What the exponents of one row are relative to: P = exp((s - center) fold - base), `fold` being the unit of a score s
// in that of ScoreBase. As a rule center = 0 and base = m fold, rounded, for some score m: one multiply-add per score,
// and as base is the same for the whole row its rounding cancels in O / l. Where that rounding might exceed what P can
// hold (|m fold| > kFar), center = m, from which the scores that count differ exactly, and base = 0.
template <class Acc>
struct RowShift {
  using Base = ScoreBase<Acc>;
  static constexpr Acc kGrowth = 8;     // P is at most 2^8, or e^8: far from what O, l and float16 can hold
  static constexpr Acc kFar = 1 << 20;  // base is rounded by 2^-5 at most

  Acc base = 0, center = 0;
  Acc limit = -Limits<Acc>::infinity();  // scores up to here need no new shift; NaN: every tile asks, see `far`

  __device__ __forceinline__ bool far() const { return center != 0; }
  // Whether a tile with this largest score has to go through `move`.
  __device__ __forceinline__ bool exceeded(Acc best) const { return !(best <= limit); }

  // Moves to score `best` if that is above the limit. Returns the factor of what has been summed up so far.
  __device__ __forceinline__ Acc move(Acc best, Acc fold) {
    const RowShift old = *this;
    if (best > (far() ? center : limit)) {
      base = best * fold;
      const bool is_far = !(fabs(base) <= kFar);
      center = is_far ? best : Acc(0);
      base = is_far ? Acc(0) : base;
      limit = is_far ? Limits<Acc>::nan() : best + kGrowth * Base::inverse(fold);
    }
    const bool first = old.limit == -Limits<Acc>::infinity();
    return first ? Acc(0) : Base::exp(::fma(old.center - center, fold, old.base - base));
  }

  // The natural logarithm of what P = 1 stands for; -inf before the first score. A score s stands for e^(s natural).
  __device__ __forceinline__ Acc log_unit(Acc natural) const {
    if (limit == -Limits<Acc>::infinity()) return limit;
    return far() ? center * natural : base * Base::kNatural;
  }

  // A sink joins the sum `total`, whose log_unit is m. Returns the factor of everything that was summed up before.
  __device__ __forceinline__ Acc join(Acc sink, Acc& m, Acc& total) const {
    const Acc gap = far() ? (sink - m) * Base::kUnit : ::fma(sink, Base::kUnit, -base);
    if (sink > m) {
      const Acc weight = m == -Limits<Acc>::infinity() ? Acc(0) : Base::exp(-gap);
      m = sink;
      total = total * weight + Base::exp(sink - m);  // 1; NaN if the sink is infinite
      return weight;
    }
    total += Base::exp(gap);
    return 1;
  }
};

// The rows that one block computes, `first` … first + rows - 1 of the queries of one sequence and head.
struct QueryBlock {
  int batch, head;
  int first;           // row of the sequence
  int q_len;           // rows from here on are padding
  int rows;            // that exist, padding included
  long long q_start;   // where the sequence begins in q and out: 0 unless ragged
  long long k_start;   // likewise in k and v
  int k_rows;          // keys that exist, padding included
  int kv_len;          // keys from here on are padding
  long long from, to;  // query i sees keys i + from … i + to - 1

  __device__ __forceinline__ int low(int i) const { return clamped(i + from); }
  __device__ __forceinline__ int high(int i) const { return clamped(i + to); }

  // begin, end: the keys that some of `count` rows see; all_begin, all_end: those that all of them see. Tiles of kKeys
  // begin at multiples of kKeys, so that the bits of a query do not depend on which others are computed with it.
  struct Keys {
    int begin, end, all_begin, all_end;
    int tiles, first;  // first: where the first tile begins
    int unseen;        // leading keys of the first tile that no query of the sequence sees, if positive
  };
  template <int kKeys>
  __device__ __forceinline__ Keys keys(int count) const {
    const int last = min(first + count, q_len) - 1, begin = low(first), end = last < first ? 0 : high(last);
    const int tile = begin / kKeys * kKeys, tiles = end > begin ? (end - tile + kKeys - 1) / kKeys : 0;
    return {begin, end, low(last), high(first), tiles, tile, low(0) - tile};
  }

 private:
  __device__ __forceinline__ int clamped(long long j) const {
    return j < 0 ? 0 : j < kv_len ? static_cast<int>(j) : kv_len;
  }
};

__device__ __forceinline__ long long clamp_index(long long value, long long low, long long high) {
  return value < low ? low : value < high ? value : high;
}

// Where sequence b of a ragged batch begins, and how many rows it has, whatever cu_seqlens holds.
struct Sequence {
  long long start;
  int rows;
};
__device__ __forceinline__ Sequence sequence_of(const long long* cu_seqlens, int total, int b) {
  const long long begin = clamp_index(ptx::ld_global(cu_seqlens + b), 0, total);
  const long long end = clamp_index(ptx::ld_global(cu_seqlens + b + 1), begin, total);
  return {begin, static_cast<int>(end - begin)};
}

__device__ __forceinline__ int blocks_of(const Sequence& sequence, int count) {
  return static_cast<int>(static_cast<unsigned int>(sequence.rows + count - 1) / count);
}

// Block `rank`, of `count` rows, of all sequences of a ragged batch: its sequence, and the block's number in it. Every
// warp finds it by itself, 32 sequences at a time. False: there is no such block. A bad cu_seqlens gives bad rows,
// never ones outside.
__device__ __forceinline__ bool find_ragged(const long long* cu_seqlens, int batch, int total, int count, int rank,
                                            int& sequence, int& number) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int base = 0; base < batch; base += 32) {
    const int b = base + lane, blocks = b < batch ? blocks_of(sequence_of(cu_seqlens, total, b), count) : 0;
    int up_to = blocks;  // of this sequence and those of lower lanes
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int below = __shfl_up_sync(0xffffffff, up_to, delta);
      if (lane >= delta) up_to += below;
    }
    const unsigned int past = __ballot_sync(0xffffffff, rank < up_to);
    if (past != 0) {
      const int owner = __ffs(past) - 1;
      number = rank - __shfl_sync(0xffffffff, up_to - blocks, owner);
      sequence = base + owner;
      return true;
    }
    rank -= __shfl_sync(0xffffffff, up_to, 31);
  }
  return false;
}

// The same in another order, of sequences of which a lane has one: n blocks of a sequence have levels n - 1 … 0, and
// the highest level comes first, as its blocks take longest where attention is causal.
constexpr int kRanked = 32;
__device__ __forceinline__ bool find_ranked(const long long* cu_seqlens, int batch, int total, int count, int rank,
                                            int& sequence, int& level) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int blocks = lane < batch ? blocks_of(sequence_of(cu_seqlens, total, lane), count) : 0;
  const auto up_from = [&](int lowest) { return __reduce_add_sync(0xffffffff, max(blocks - lowest, 0)); };
  if (rank >= up_from(0)) return false;
  level = 0;
  for (int above = __reduce_max_sync(0xffffffff, blocks); above - level > 1;) {
    const int middle = (level + above) / 2;
    (up_from(middle) > rank ? level : above) = middle;
  }
  // Of the sequences that have the level, in their order.
  rank -= up_from(level + 1);
  const unsigned int having = __ballot_sync(0xffffffff, blocks > level);
  const bool is_it = blocks > level && __popc(having & ((1u << lane) - 1)) == rank;
  sequence = max(__ffs(__ballot_sync(0xffffffff, is_it)) - 1, 0);  // of a bad cu_seqlens there may be none
  return true;
}

__device__ __forceinline__ bool is_ranked(const AttentionParams& params) {
  return params.descending && params.batch <= kRanked;
}

// What of a sequence is padding, and which keys its queries see.
__device__ __forceinline__ void find_bounds(const AttentionParams& params, QueryBlock& block) {
  const int b = block.batch;
  block.q_len = block.rows;
  block.kv_len = block.k_rows;
  if (params.q_lens != nullptr) {
    block.q_len = static_cast<int>(clamp_index(ptx::ld_global(params.q_lens + b), 0, block.rows));
  }
  if (params.kv_lens != nullptr) {
    block.kv_len = static_cast<int>(clamp_index(ptx::ld_global(params.kv_lens + b), 0, block.k_rows));
  }
  constexpr long long kMost = AttentionParams::kUnbounded;
  long long offset = params.bottom_right ? block.kv_len - block.q_len : params.offset;
  if (params.q_offset != nullptr) offset = clamp_index(ptx::ld_global(params.q_offset + b), -kMost, kMost);
  block.from = offset - params.left;
  block.to = offset + params.right + 1;
}

// The `count` rows of this block. Heads are taken `heads_in_l2` at a time, so that their K and V stay in L2; among
// these the rows that see most keys come first. The heads begin with `first_unit`.
__device__ __forceinline__ bool find_block(const AttentionParams& params, int count, int heads, unsigned int index,
                                           QueryBlock& block, int first_unit = 0) {
  const unsigned int blocks = static_cast<unsigned int>(params.heads_in_l2) * params.row_blocks;
  const int base = static_cast<int>(index / blocks) * params.heads_in_l2;
  const int together = min(params.heads_in_l2, heads - base);
  const int unit = first_unit + base + static_cast<int>(index % blocks) % together;
  int number = static_cast<int>(index % blocks) / together;
  const bool ragged = params.cu_seqlens_q != nullptr, ranked = ragged && is_ranked(params);
  if (params.descending && !ranked) number = params.row_blocks - 1 - number;
  block.head = unit % params.heads;
  block.batch = unit / params.heads % params.batch;
  block.q_start = block.k_start = 0;
  block.rows = params.q_rows;
  block.k_rows = params.k_rows;
  if (ragged) {
    const bool found =
        ranked ? find_ranked(params.cu_seqlens_q, params.batch, params.q_rows, count, number, block.batch, number)
               : find_ragged(params.cu_seqlens_q, params.batch, params.q_rows, count, number, block.batch, number);
    if (!found) return false;
    const Sequence queries = sequence_of(params.cu_seqlens_q, params.q_rows, block.batch);
    const Sequence keys = sequence_of(params.cu_seqlens_k, params.k_rows, block.batch);
    block.q_start = queries.start;
    block.rows = queries.rows;
    block.k_start = keys.start;
    block.k_rows = keys.rows;
  }
  block.first = number * count;
  find_bounds(params, block);
  return true;
}

// A bias as an accumulator: finite ones stay so, those of float64 in float32, too.
template <class To, class From>
__device__ __forceinline__ To to_finite(From value) {
  const To most = Limits<To>::most(), converted = to_acc<To>(value);
  if constexpr (sizeof(From) > sizeof(To)) {
    if (fabs(converted) > most && fabs(value) <= Limits<From>::most()) return value < 0 ? -most : most;
  }
  return converted;
}

// Derivatives of a score: of the softcap, by scale (q k), and of the score expression, by what it changes.
template <class Acc>
struct ScoreChain {
  Acc cap = 1, score = 1;
};

// Scores of one warp's fragments (attention/matmul.cuh) after all but the masks of position. kModified: they are scaled
// here; else only the softmax scales them. Op::Acc scores; bias of type Bias; Score: a score expression.
template <bool kModified, class Bias, bool kMasked, class Acc, class Score = NoScore>
struct ScoreRule {
  using Base = ScoreBase<Acc>;

  const AttentionParams& params;
  const QueryBlock& block;
  const Bias* bias;
  const bool* mask;
  Acc slope;
  long long offset;
  int head;

  __device__ __forceinline__ ScoreRule(const AttentionParams& params, const QueryBlock& block, int head)
      : params(params),
        block(block),
        bias(nullptr),
        mask(nullptr),
        slope(0),
        offset(block.to - params.right - 1),
        head(head) {
    const long long b = block.batch, h = head;
    if constexpr (!kIsSame<Bias, NoBias>) {
      bias = static_cast<const Bias*>(params.bias) + b * params.bias_stride[0] + h * params.bias_stride[1];
    }
    if constexpr (kMasked) {
      mask = static_cast<const bool*>(params.mask) + b * params.mask_stride[0] + h * params.mask_stride[1];
    }
    if (kModified && params.alibi_slopes != nullptr) {
      slope = ptx::ld_global(static_cast<const Acc*>(params.alibi_slopes) + b * params.alibi_stride[0] +
                             h * params.alibi_stride[1]);
    }
  }

  // Whether the array lets query i see key j.
  __device__ __forceinline__ bool allowed(int i, int j) const {
    return i < params.mask_rows && j < params.mask_cols &&
           ptx::ld_global(mask + i * params.mask_stride[2] + j * params.mask_stride[3]);
  }

  __device__ __forceinline__ Acc score(Acc s, int i, int j) const {
    ScoreChain<Acc> unused;
    return score<false>(s, i, j, unused);
  }

  // With kChain also its derivatives; that of the softcap is 1 - tanh^2, without its cancellation.
  template <bool kChain>
  __device__ __forceinline__ Acc score(Acc s, int i, int j, ScoreChain<Acc>& chain) const {
    chain = {};
    if constexpr (!kModified) return s;
    s *= static_cast<Acc>(params.scale);
    if (params.softcap != 0) {
      const Acc cap = static_cast<Acc>(params.softcap), x = s / cap;
      if (fabs(x) > Base::kLinear) {  // else tanh x = x; and x may be subnormal
        s = cap * tanh(x);
        if constexpr (kChain) {
          const Acc e = exp_natural(-2 * fabs(x)), inverse = 1 / (1 + e);
          chain.cap = 4 * e * inverse * inverse;
        }
      }
    }
    if constexpr (!kIsSame<Bias, NoBias>) {
      if (i < params.bias_rows && j < params.bias_cols) {
        s += to_finite<Acc>(ptx::ld_global(bias + i * params.bias_stride[2] + j * params.bias_stride[3]));
      }
    }
    if (slope != 0) s -= slope * distance(i, j);
    if constexpr (!kIsSame<Score, NoScore>) {
      const auto changed = [&](auto&... derivative) {
        return Score::template score<Acc>(s, block.batch, head, i + offset, j, params.score_arrays, derivative...);
      };
      if constexpr (kChain) {
        s = changed(chain.score);
      } else {
        s = changed();
      }
    }
    return s;
  }

  // Of the place of query i among the keys, and key j.
  __device__ __forceinline__ Acc distance(int i, int j) const {
    const long long between = i + offset - j;
    return static_cast<Acc>(between < 0 ? -between : between);
  }
};
