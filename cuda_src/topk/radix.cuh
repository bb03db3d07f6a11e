// Radix selection, what its kernels share: the wanted elements of a row are those of lowest rank.
//
// A rank is the complement of the candidate's key, then the index, so that 0 is the best and no two are equal. The
// kernels look at 11 bits of it at a time: a histogram tells in which bin the last wanted element lies, earlier bins
// are taken whole, later ones dropped, and the next 11 bits decide within the bin.
//
//   topk_clear       histograms and counters to zero
//   topk_histogram   reads x: the first 11 bits                                     slices of rows
//   topk_filter      reads x: writes earlier bins to a list, the bin to a buffer    slices of rows
//   topk_select      the other bits, over the buffer, until a bin is taken whole    one block per row
//   topk_sort, topk_merge_runs, topk_store                                          the list, sorted and stored
//
// Zhang et al., Parallel Top-K Algorithms on GPU: A Comprehensive Study and New Methods, SC'23,
// doi 10.1145/3581784.3607062 (AIR top-k), sections 3.1 and 3.2.
#pragma once

#include <primitives/block.cuh>
#include <topk/sample.cuh>

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kBinGroups = kBins / 32;  // sums of 32 neighbouring bins stand behind the bins

// A launch computes some neighbouring rows; offsets are in bytes from the start of `workspace`, where every array
// begins with the first of these rows.
template <class TopKParams_>
struct RadixParams {
  TopKParams_ topk;          // row.stat, row.stat_l: m and l of all elements of a row, inputs; null: not needed
  unsigned char* workspace;  // 16-byte aligned; begins with the histograms, Count [rows, kBins + kBinGroups]
  long long first_row;       // of the launch
  long long splits;          // blocks that share a row in topk_histogram and topk_filter
  long long slice;           // columns of each of them
  long long wanted;          // min(k, cols)
  long long counters;        // unsigned long long [rows, 2]: elements in the list, in the buffer
  long long buffer;          // Candidate [rows, cols]
  long long list;            // Candidate [rows, wanted]
  long long cleared;         // bytes that topk_clear zeroes, a multiple of 16
  long long run;             // candidates of a sorted run: what topk_merge_runs finds
  long long source, target;  // what the sorting kernels read and write: Candidate [rows, wanted]

  template <class T>
  __device__ __forceinline__ T* at(long long offset, long long element) const {
    return reinterpret_cast<T*>(workspace + offset) + element;
  }
};

// ---- Ranks --------------------------------------------------------------------------------------

// Which bits of a key an op's elements differ in, and their order.
template <class Op>
struct RadixOrder {
  using Candidate = typename Op::Candidate;
  using Key = typename Candidate::Key;
  using Ordered = typename Op::Ordered;
  using Count = typename Select<sizeof(Candidate) == 8, unsigned int, unsigned long long>::Type;

  // Integers below 32 bits have keys next to each other; signed ones around 2^31, which an offset moves to 0.
  static constexpr bool kSigned = kIsSame<Ordered, signed char> || kIsSame<Ordered, short>;
  static constexpr bool kShort = kSigned || kIsSame<Ordered, unsigned char> || kIsSame<Ordered, unsigned short>;
  static constexpr int kBits = kShort ? 8 * sizeof(Ordered) : sizeof(Ordered) == 8 ? 64 : 32;
  static constexpr Key kOffset = kSigned ? Key(1) << (kBits - 1) : 0;
  static constexpr Key kMask = static_cast<Key>(~0ULL >> (64 - kBits));
  static constexpr int kFirstLow = kBits > kDigitBits ? kBits - kDigitBits : 0;  // lowest of the first 11 bits

  static __device__ __forceinline__ Key key_rank(Candidate candidate) {
    return ~static_cast<Key>(candidate.key() + kOffset) & kMask;
  }
  static __device__ __forceinline__ unsigned int first_bin(Candidate candidate) {
    return static_cast<unsigned int>(key_rank(candidate) >> kFirstLow);
  }
};

// The first bits of the rank of the last wanted element, as far as they are known.
template <class Op>
struct RadixCut {
  using Order = RadixOrder<Op>;
  using Candidate = typename Op::Candidate;

  typename Order::Key key;
  int key_low;  // key bits below are not known
  unsigned long long index;
  int index_low;  // nor are these of the index, which follows once the whole key is known

  __device__ __forceinline__ RadixCut(unsigned int first_bin, long long cols)
      : key(first_bin), key_low(Order::kFirstLow), index(0), index_low(64 - __clzll(cols - 1)) {}

  // Whether a candidate's rank begins with less (-1), the same (0) or more (1).
  __device__ __forceinline__ int compare(Candidate candidate) const {
    const typename Order::Key high = Order::key_rank(candidate) >> key_low;
    if (high != key) return high < key ? -1 : 1;
    const unsigned long long high_index = static_cast<unsigned long long>(candidate.index()) >> index_low;
    return high_index < index ? -1 : high_index > index;
  }

  // The last candidate whose rank begins so.
  __device__ __forceinline__ Candidate last() const {
    typename Order::Key rank = key;
    unsigned long long last_index = index;
    for (int i = 0; i < key_low; ++i) rank = 2 * rank + 1;
    for (int i = 0; i < index_low; ++i) last_index = 2 * last_index + 1;
    return Candidate::make((~rank & Order::kMask) - Order::kOffset, last_index);
  }
  __device__ __forceinline__ bool is_one() const { return key_low == 0 && index_low == 0; }

  // The next bits, at most 11 and never of both key and index.
  __device__ __forceinline__ int width() const {
    const int unknown = key_low > 0 ? key_low : index_low;
    return unknown < kDigitBits ? unknown : kDigitBits;
  }
  __device__ __forceinline__ unsigned int bin(Candidate candidate) const {
    const unsigned int mask = (1u << width()) - 1;
    if (key_low > 0) return static_cast<unsigned int>(Order::key_rank(candidate) >> (key_low - width())) & mask;
    return static_cast<unsigned int>(candidate.index() >> (index_low - width())) & mask;
  }
  __device__ __forceinline__ void extend(unsigned int bin) {
    const int bits = width();
    if (key_low > 0) {
      key = key << bits | bin;
      key_low -= bits;
    } else {
      index = index << bits | bin;
      index_low -= bits;
    }
  }
};

// ---- Histograms ---------------------------------------------------------------------------------

// Counts into shared memory. A run of equal bins is one atomic: else the threads of a constant row would queue up.
template <class Count>
struct BinCounter {
  Count* bins;
  unsigned int bin = 0;
  Count run = 0;

  __device__ __forceinline__ void add(unsigned int next, Count weight = 1) {
    if (next != bin) flush();
    bin = next;
    run += weight;
  }
  __device__ __forceinline__ void flush() {
    if (run > 0) atomicAdd(bins + bin, run);
    run = 0;
  }
};

// Zeroes a block's histogram in shared memory.
template <int kThreads, class Count>
__device__ __forceinline__ void clear_bins(Count* bins) {
  for (int b = threadIdx.x; b < kBins; b += kThreads) ptx::st_shared(bins + b, Count(0));
  __syncthreads();  // every bin is zero before any thread counts
}

// Sums its groups of bins, once every thread has counted.
template <int kThreads, class Count>
__device__ __forceinline__ void sum_bin_groups(Count* bins) {
  __syncthreads();  // everything is counted before groups are summed
  for (int b = threadIdx.x; b < kBins; b += kThreads) {
    const Count sum = group_sum<32>(ptx::ld_shared(bins + b));
    if (threadIdx.x % 32 == 0) ptx::st_shared(bins + kBins + b / 32, sum);
  }
  __syncthreads();  // all groups are summed before any warp looks at them
}

// The bin of the last wanted element, which holds `inside` elements; the bins ahead of it hold `before`.
template <class Count>
struct RadixBin {
  unsigned int bin;
  Count before;
  Count inside;
};

// The bin where the running sum of counts reaches `wanted`, which is at least 1 and at most the whole sum. A lane holds
// bins lane * kPer to lane * kPer + kPer - 1. The whole warp calls it; every lane gets the result.
template <int kPer, class Count>
__device__ __forceinline__ RadixBin<Count> find_bin_of(const Count (&count)[kPer], Count wanted) {
  const int lane = threadIdx.x % 32;
  Count sum = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) sum += count[i];
  const Count reached = sum_up_to_lane(sum);
  Count before = reached - sum;
  unsigned int bin = lane * kPer;
  Count inside = count[0];
#pragma unroll
  for (int i = 1; i < kPer; ++i) {
    if (before + inside >= wanted) continue;
    before += inside;
    inside = count[i];
    ++bin;
  }
  const int found = __ffs(__ballot_sync(0xffffffff, reached >= wanted)) - 1;
  return {__shfl_sync(0xffffffff, bin, found), __shfl_sync(0xffffffff, before, found),
          __shfl_sync(0xffffffff, inside, found)};
}

// The same in a whole histogram: load(i) is bin i, load(kBins + g) is group g.
template <class Count, class Load>
__device__ __forceinline__ RadixBin<Count> find_bin(const Load& load, Count wanted) {
  const int lane = threadIdx.x % 32;
  const Count sum[2] = {load(kBins + 2 * lane), load(kBins + 2 * lane + 1)};
  static_assert(kBinGroups == 64, "two groups per lane");
  const RadixBin<Count> group = find_bin_of(sum, wanted);
  const Count count[1] = {load(static_cast<int>(group.bin) * 32 + lane)};
  const RadixBin<Count> within = find_bin_of(count, wanted - group.before);
  return {group.bin * 32 + within.bin, group.before + within.before, within.inside};
}

// The same for the whole block, which calls it together; the first warp does the work. Shared memory: three counts.
template <class Count, class Load>
__device__ __forceinline__ RadixBin<Count> block_find_bin(const Load& load, Count wanted) {
  Count* slots = ptx::static_smem<Count, 3>();
  if (threadIdx.x < 32) {
    const RadixBin<Count> found = find_bin(load, wanted);
    if (threadIdx.x == 0) {
      ptx::st_shared(slots, Count(found.bin));
      ptx::st_shared(slots + 1, found.before);
      ptx::st_shared(slots + 2, found.inside);
    }
  }
  __syncthreads();  // the first warp has looked at the histogram and written what it found
  return {static_cast<unsigned int>(ptx::ld_shared(slots)), ptx::ld_shared(slots + 1), ptx::ld_shared(slots + 2)};
}

// ---- Walking ------------------------------------------------------------------------------------

// visit(items, first_col, from, to) for each tile of columns start ... start + size - 1 of the op's row, counted from a
// fragment boundary (vector.cuh); item j of a thread is at columns
// first_col + j * kThreads * kVec and following, and those from first_col + `from` to first_col + `to` count. The next
// tile is in flight while one is visited. Every thread of the block makes the same number of visits.
template <bool kStreaming, int kThreads, int kVec, int kFragments, class Op, class Visit>
__device__ __forceinline__ void walk_slice(const Op& op, long long start, long long size, const Visit& visit) {
  constexpr int kStep = kThreads * kVec;
  constexpr int kTile = kStep * kFragments;
  const long long cols = op.params.row.cols;
  start -= kVec > 1 ? op.past_boundary() : 0;
  const long long begin = start > 0 ? start : 0;
  const long long end = start + size < cols ? start + size : cols;

  typename Op::template Loaded<kVec> loaded[kFragments];
  const auto load = [&](long long first_col) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) op.template load<kStreaming>(loaded[j], first_col + j * kStep, begin, end);
  };
  load(start + threadIdx.x * kVec);
  for (long long tile = start; tile < end; tile += kTile) {
    const long long first_col = tile + threadIdx.x * kVec;
    typename Op::template Items<kVec> items[kFragments];
#pragma unroll
    for (int j = 0; j < kFragments; ++j) op.unpack(items[j], loaded[j], first_col + j * kStep, begin, end);
    if (tile + kTile < end) load(first_col + kTile);
#pragma unroll
    for (int j = 0; j < kFragments; ++j) op.add_noise(items[j], first_col + j * kStep);
    const long long from = begin - first_col, to = end - first_col;
    visit(items, first_col, from > 0 ? static_cast<int>(from) : 0, to < kTile ? static_cast<int>(to) : kTile);
  }
}

// visit(candidate) for `count` candidates in global memory, kAhead loads per thread in flight. Every thread of the
// block makes the same number of visits, some with Candidate::none().
template <int kThreads, class Candidate, class Count, class Visit>
__device__ __forceinline__ void walk_candidates(const Candidate* candidates, Count count, const Visit& visit) {
  constexpr int kAhead = 64 / sizeof(Candidate), kStep = kThreads * kAhead;
  // Counts down what is left: the end of the last step may not fit into a Count.
  for (Count left = count; left > 0; left -= left < kStep ? left : kStep, candidates += kStep) {
    Candidate candidate[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const unsigned int e = i * kThreads + threadIdx.x;
      candidate[i] = e < left ? ptx::ld_global(candidates + e) : Candidate::none();
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i * kThreads < left) visit(candidate[i]);
    }
  }
}

// ---- Results ------------------------------------------------------------------------------------

// Stores results begin ... end - 1 of a row; sorted(e) is candidate e. The whole block calls it; with
// params.topk.renormalize it adds up all k probabilities, always in the same order.
template <int kThreads, class Op, class Params, class Sorted>
__device__ __forceinline__ void store_sorted(const Op& op, const Params& params, long long row, const Sorted& sorted,
                                             long long begin, long long end) {
  using State = typename Op::State;
  State norm = State::identity();
  if constexpr (!kIsSame<State, NoState>) {
    if (params.topk.renormalize) {
      for (long long e = threadIdx.x; e < params.wanted; e += kThreads)
        norm = norm.merge(op.selected(sorted(e)), op.unit);
      norm = block_merge<kThreads / 32>(norm.template merge_group<32>(op.unit), op.unit);
    } else if (params.topk.row.stat) {
      const long long offset = params.topk.row.row_offset(kStat, row);
      norm.m = ptx::ld_global(static_cast<decltype(norm.m)*>(params.topk.row.stat) + offset) / op.unit;
      norm.l = ptx::ld_global(static_cast<decltype(norm.l)*>(params.topk.row.stat_l) + offset);
    }
  }
  for (long long e = begin + threadIdx.x; e < end; e += kThreads) op.store(e, sorted(e), norm);
}
