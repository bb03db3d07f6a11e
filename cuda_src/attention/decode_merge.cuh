// Softmax sums of parts of the keys, put together: of a block's teams, and of the blocks that share a pair.
//
//   out_i, base_i, center_i, l_i of each part -> out = sum_i w_i out_i / sum_i w_i l_i,  w_i = e^(m_i - m)
//
// in the order of the parts, so that results are the same on every run. RowShift (attention/scores.cuh) says what base
// and center are. A part without keys has base -inf and l 0.
#pragma once

#include <attention/decode_rows.cuh>
#include <primitives/vector.cuh>
#include <primitives/warp.cuh>
#include <ptx/atomic.cuh>

template <class Acc>
struct PartStat {
  Acc base, center, l;
};

// Columns of one row that a thread puts together.
template <class Acc>
struct RowSum {
  using Base = ScoreBase<Acc>;
  static constexpr int kColumns = 16 / sizeof(Acc);
  using Columns = Fragment<Acc, kColumns>;
  Columns sum{};
  RowShift<Acc> shift;
  Acc total = 0;

  // The shift of the part whose scores are the largest; `stat(i)` is that of part i.
  template <class Stat>
  __device__ __forceinline__ void find_shift(long long parts, Acc fold, Stat stat) {
    Acc most = -Limits<Acc>::infinity();
    for (long long i = 0; i < parts; ++i) {
      const PartStat<Acc> of = stat(i);
      const Acc m = ::fma(of.center, fold, of.base);
      if (!(m <= most)) most = m, shift.base = of.base, shift.center = of.center, shift.limit = 0;
    }
  }
  __device__ __forceinline__ void add(const PartStat<Acc>& of, const Columns& columns, Acc fold) {
    if (of.l == 0) return;  // no key: its columns are zeros
    const Acc weight = Base::exp(::fma(of.center - shift.center, fold, of.base - shift.base));
    total = ::fma(weight, of.l, total);
#pragma unroll
    for (int e = 0; e < kColumns; ++e) sum.element[e] = ::fma(weight, columns.element[e], sum.element[e]);
  }
};

// out and lse of columns of a row; `natural`: a score s stands for e^(s natural).
template <class T, class Acc>
__device__ __forceinline__ void store_row(const RowTile& rows, int row, int column, int columns, RowSum<Acc>& of,
                                          Acc natural) {
  const DecodeParams& p = rows.p;
  const long long query = rows.query(row), head = rows.query_head(row), b = rows.b;
  const bool padding = rows.is_padding(row);
  Acc m = of.shift.log_unit(natural), total = of.total, weight = 1;
  if (p.sinks != nullptr)
    weight = of.shift.join(ptx::ld_global(static_cast<const Acc*>(p.sinks) + head * p.sinks_stride), m, total);
  if (p.lse != nullptr && column == 0) {
    const Acc infinity = Limits<Acc>::infinity();
    const Acc lse = padding ? -infinity : m + log_natural(total);
    ptx::st_global(static_cast<Acc*>(p.lse) + b * p.lse_stride[0] + head * p.lse_stride[1] + query * p.lse_stride[2],
                   lse);
  }
  constexpr int kColumns = RowSum<Acc>::kColumns;
  typename RowSum<Acc>::Columns sums;
  Fragment<T, kColumns> values;
#pragma unroll
  for (int e = 0; e < kColumns; ++e) {
    const bool nothing = padding || total == 0;
    sums.element[e] = nothing ? Acc(0) : of.sum.element[e] * weight / total * static_cast<Acc>(p.v_factor);
    values.element[e] = from_acc<T>(sums.element[e]);
  }
  const long long at =
      b * p.out_stride[0] + head * p.out_stride[1] + query * p.out_stride[2] + column * p.out_stride[3];
  if (sizeof(T) < sizeof(Acc) && p.out_is_float) {
    store_left(static_cast<Acc*>(p.out) + at, sums, columns, p.out_stride[3], p.out_is_vector);
  } else {
    store_left(static_cast<T*>(p.out) + at, values, columns, p.out_stride[3], p.out_is_vector);
  }
}

template <class Acc>
__device__ __forceinline__ void put_stat(PartStat<Acc>* stat, const RowShift<Acc>& shift, Acc total) {
  const bool none = shift.limit == -Limits<Acc>::infinity();
  ptx::st_shared(&stat->base, none ? -Limits<Acc>::infinity() : shift.base);
  ptx::st_shared(&stat->center, shift.center);
  ptx::st_shared(&stat->l, total);
}

// O of a warp's 16 rows -> `own`, rows of kValueDim; and their statistics. Columns are swizzled in groups of 8, so that
// what a warp stores, and what it reads by rows, meets every bank once.
template <bool kSumsRows, class Acc, int kDTiles>
__device__ __forceinline__ void put_part(Acc* own, PartStat<Acc>* stats, int warp_row, const Acc (&o)[kDTiles][4],
                                         const Acc (&l)[2], const RowShift<Acc> (&shift)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  using Pair = Fragment<Acc, 2>;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + lane / 4 + 8 * half;
    const Acc total = kSumsRows ? l[half] : group_sum<4>(l[half]);
    if (lane % 4 == 0) put_stat(stats + row, shift[half], total);
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      Acc* to = own + row * 8 * kDTiles + (low ^ row % 4) * 8 + lane % 4 * 2;
#pragma unroll
      for (int d = low; d < kDTiles; d += 4, to += 32) {
        ptx::st_shared(reinterpret_cast<Pair*>(to), Pair{o[d][2 * half], o[d][2 * half + 1]});
      }
    }
  }
}

template <class Acc>
__device__ __forceinline__ PartStat<Acc> ld_stat(const PartStat<Acc>* stat) {
  return {ptx::ld_shared(&stat->base), ptx::ld_shared(&stat->center), ptx::ld_shared(&stat->l)};
}

// The parts of a pair in the workspace: of the units first … end - 1, those of a split or those of blocks.
template <class T, int kRows, int kValueDim, class Acc>
struct PairParts {
  using Sum = RowSum<Acc>;
  using Columns = typename Sum::Columns;
  static constexpr int kGroups = kValueDim / Sum::kColumns;  // of columns of a row
  const RowTile& rows;
  const Acc natural;
  Acc* parts;
  int part_rows;
  int first_column, own_column;  // of this pair; those before own_column are also another pair's, which stores them
  long long first, last, mine;   // mine: of this segment
  unsigned int* counter;
  bool whole, split;  // whole: the segment has all keys of the pair, and nothing goes to the workspace

  template <int kKeys>
  __device__ __forceinline__ PairParts(const RowTile& rows, const KeyCursor<kKeys>& cursor, const Shares& shares,
                                       int first_column, Acc natural)
      : rows(rows),
        natural(natural),
        parts(static_cast<Acc*>(rows.p.parts)),
        part_rows(min(kRows, rows.p.group * rows.p.q_rows)),  // of every part; `rows.count` of them hold something
        first_column(first_column),
        own_column(cursor.column * kValueDim),
        whole(cursor.is_whole()),
        split(rows.p.split != 0) {
    const long long first_unit = cursor.unit - cursor.unit_of_pair(rows.p);
    const long long end_unit = first_unit + cursor.units(rows.p, cursor.lengths);
    first = split ? first_unit : shares.of_unit(first_unit);
    last = split ? end_unit - 1 : shares.of_unit(end_unit - 1);
    mine = split ? cursor.unit : static_cast<long long>(blockIdx.x);
    counter = rows.p.counters + (split ? cursor.pair(rows.p) : first);
  }
  // A block has two parts at most: its first segment, and its last one, with which a pair begins.
  __device__ __forceinline__ Acc* part(long long i) const {
    return parts + (split ? i : 2 * i + (i == first)) * (part_rows * kValueDim + (3 * part_rows + 3) / 4 * 4);
  }
  __device__ __forceinline__ void store(int row, int group, Sum& sum) const {
    const int column = first_column + group * Sum::kColumns;
    if (column >= own_column) store_row<T>(rows, row, column, rows.p.value_dim - column, sum, natural);
  }

  // A group of columns of this segment -> out and lse, or a part.
  __device__ __forceinline__ void put(int row, int group, Sum& sum) const {
    if (whole) return store(row, group, sum);
    Acc* const to = part(mine);
    ptx::st_global(reinterpret_cast<Columns*>(to + row * kValueDim + group * Sum::kColumns), sum.sum);
    if (group == 0) {
      Acc* stat_of = to + part_rows * kValueDim + row;
      const bool none = sum.shift.limit == -Limits<Acc>::infinity();
      ptx::st_global(stat_of, none ? -Limits<Acc>::infinity() : sum.shift.base);
      ptx::st_global(stat_of + part_rows, sum.shift.center);
      ptx::st_global(stat_of + 2 * part_rows, sum.total);
    }
  }
  // All parts -> out and lse, where this block is the last of the pair to come. The first kThreads threads of the block
  // call it, all of them or by `barrier`.
  template <int kThreads, class... Barrier>
  __device__ __forceinline__ void merge(Acc fold, Barrier... barrier) const {
    if (whole || !ptx::arrive_is_last(counter, static_cast<unsigned int>(last - first + 1), barrier...)) return;
    for (int index = static_cast<int>(threadIdx.x); index < rows.count * kGroups; index += kThreads) {
      const int row = index / kGroups, group = index % kGroups;
      const auto stat = [&](long long i) {
        const Acc* of = part(first + i) + part_rows * kValueDim + row;
        return PartStat<Acc>{ptx::ld_global_cg(of), ptx::ld_global_cg(of + part_rows),
                             ptx::ld_global_cg(of + 2 * part_rows)};
      };
      Sum sum;
      sum.find_shift(last - first + 1, fold, stat);
#pragma unroll 4
      for (long long i = 0; i <= last - first; ++i) {
        const Acc* columns = part(first + i) + row * kValueDim + group * Sum::kColumns;
        sum.add(stat(i), ptx::ld_global_cg(reinterpret_cast<const Columns*>(columns)), fold);
      }
      store(row, group, sum);
    }
  }
};

// The teams' parts -> those of the segment.
template <int kTeams, int kThreads, class T, int kRows, int kValueDim, class Acc>
__device__ __forceinline__ void merge_teams(const PairParts<T, kRows, kValueDim, Acc>& parts,
                                            const PartStat<Acc>* stats, const Acc* smem, const int* places, Acc fold) {
  using Parts = PairParts<T, kRows, kValueDim, Acc>;
  using Sum = typename Parts::Sum;
  for (int index = static_cast<int>(threadIdx.x); index < parts.rows.count * Parts::kGroups; index += kThreads) {
    const int row = index / Parts::kGroups, group = index % Parts::kGroups;
    const auto stat = [&](long long team) { return ld_stat(stats + team * kRows + row); };
    Sum sum;
    sum.find_shift(kTeams, fold, stat);
#pragma unroll
    for (int team = 0; team < kTeams; ++team) {
      const int column = (group * Sum::kColumns) ^ row % 4 * 8;
      const Acc* columns = smem + ptx::ld_shared(places + team) + row * kValueDim + column;
      sum.add(stat(team), ptx::ld_shared(reinterpret_cast<const typename Sum::Columns*>(columns)), fold);
    }
    parts.put(row, group, sum);
  }
}

// O of a warp's 16 rows, its columns from group `first_group` on, -> the segment's.
template <bool kSumsRows, class T, int kRows, int kValueDim, class Acc, int kDTiles>
__device__ __forceinline__ void put_columns(const PairParts<T, kRows, kValueDim, Acc>& parts, int warp_row,
                                            int first_group, const Acc (&o)[kDTiles][4], const Acc (&l)[2],
                                            const RowShift<Acc> (&shift)[2]) {
  using Sum = RowSum<Acc>;
  const int lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + lane / 4 + 8 * half;
    Sum sum;
    sum.shift = shift[half];
    sum.total = kSumsRows ? l[half] : group_sum<4>(l[half]);
    if constexpr (Sum::kColumns == 2) {
#pragma unroll
      for (int d = 0; d < kDTiles; ++d) {
        sum.sum = {o[d][2 * half], o[d][2 * half + 1]};
        if (row < parts.rows.count) parts.put(row, first_group + 4 * d + t, sum);
      }
    } else {  // lanes of a pair exchange halves: an even one has 4 columns of tile d, an odd one of tile d + 1
#pragma unroll
      for (int d = 0; d < kDTiles; d += 2) {
        const bool odd = t % 2 != 0;
        Acc own[2], other[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Acc low = o[d][2 * half + e], high = o[d + 1][2 * half + e];
          own[e] = odd ? high : low;
          other[e] = __shfl_xor_sync(0xffffffff, odd ? low : high, 1);
        }
        sum.sum = odd ? typename Sum::Columns{other[0], other[1], own[0], own[1]}
                      : typename Sum::Columns{own[0], own[1], other[0], other[1]};
        if (row < parts.rows.count) parts.put(row, first_group + 2 * (d + odd) + t / 2, sum);
      }
    }
  }
}
