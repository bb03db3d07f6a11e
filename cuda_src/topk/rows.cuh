// The k best elements of each row, k <= 32 * kPerLane, and in SoftmaxTopK its softmax state: one read, and nothing of
// the row's length is written.
//
//   each warp, tile by tile:  m, l <- the tile's maximum, one exponential per element     (SoftmaxTopK)
//                             tile maximum below the k-th best so far: next tile
//                             else what beats the k-th goes to the warp's queue, and by batches into its list
//   the row:                  merge the lists and states of its warps, then of its blocks
//
// kWarpsPerRow warps of a block share a row, or kRowsPerBlock warps have one each; params.splits blocks share it: a
// cluster (kClusterSize > 1), whose first block gets all lists, or blocks whose lists topk_merge merges. Block b is
// number b % splits of those of row group b / splits. Elements of a row are taken kVec at a time from fragment
// boundaries (vector.cuh), or one by one (kVec = 1) at any stride.
//
// A tile is what a warp examines at once. Part p of a row is the tiles p, p + parts, ...: each part is spread over the
// whole row, so that in a row that rises from end to end, after the first part only the last tile of a part can beat
// those before. Of the warps that share the row, warp w takes the parts w, w + warps, ...; the state of a part depends
// on the part alone, and states are merged in one order: lane p % 32 merges part p, then the lanes are merged. So no
// bit depends on how many warps there are. Shared memory: one queue per warp, which later holds its list; one bound per
// warp; 32 states.
#pragma once

#include <topk/sample.cuh>
#include <primitives/block.cuh>
#include <primitives/warp_list.cuh>

// Two blocks per SM, where that many registers are enough on every architecture.
template <class Op, int kWarpsPerRow, int kRowsPerBlock, int kPerLane, int kVec, int kFragments, int kClusterSize>
__global__ void __launch_bounds__(32 * kWarpsPerRow * kRowsPerBlock,
                                  kVec == 1 || sizeof(typename Op::Candidate) == 16 || (Op::kHasMask && kPerLane == 8)
                                      ? 1
                                      : 2) CLUSTER_DIMS(kClusterSize)
    topk_rows(const __grid_constant__ typename Op::Params params) {
  constexpr int kWarps = kWarpsPerRow * kRowsPerBlock;
  constexpr int kStep = 32 * kVec;
  constexpr long long kTile = kStep * kFragments;
  static_assert(kRowsPerBlock == 1 || (kWarpsPerRow == 1 && kClusterSize == 1), "a block merges the warps of one row");
  static_assert(kClusterSize <= kWarps, "one warp per list of the cluster");
  using Candidate = typename Op::Candidate;
  using Key = typename Candidate::Key;
  using State = typename Op::State;
  using List = WarpList<Candidate, kPerLane>;
  constexpr bool kHasState = !kIsSame<State, NoState>;
  constexpr int kQueue = 32 * (kVec * kFragments + List::kBatch);
  static_assert(kQueue >= 32 * kPerLane, "a queue's memory holds a list");
  static_assert(!kHasState || 32 % (kWarpsPerRow * kClusterSize) == 0, "the parts of a lane are those of one warp");

  // Row of this thread. Warps past the last row, or of one that is not wanted, own no column but take part in every
  // collective.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int thread = threadIdx.x % (32 * kWarpsPerRow);
  const unsigned splits = kClusterSize > 1 ? kClusterSize : static_cast<unsigned>(params.row.splits);
  const unsigned split = blockIdx.x % splits;
  const long long row = static_cast<long long>(blockIdx.x / splits) * kRowsPerBlock + warp / kWarpsPerRow;
  const bool is_row = row < params.row.rows;
  const Op op(params, is_row ? row : 0);
  const bool exists = is_row && op.is_wanted();
  const int past = kVec > 1 ? op.past_boundary() : 0;
  const long long end = exists ? params.row.cols : 0;

  Candidate* queues = ptx::static_smem<Candidate, kWarps * kQueue>();
  Key* bounds = ptx::static_smem<Key, kWarps>();  // a key that ceil(k / kWarpsPerRow) elements of each warp reach
  const int share = (static_cast<int>(params.k) - 1) / kWarpsPerRow;
  if constexpr (kWarpsPerRow > 1) {
    if (lane == 0) ptx::st_shared_relaxed(bounds + warp, Key(0));
    __syncthreads();  // all bounds are there before any warp reads them
  }
  State* states = ptx::static_smem<State, 32, 1>();
  unsigned long long* mbarrier = ptx::static_smem<unsigned long long, 1, 2>();
  if constexpr (kClusterSize > 1) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(mbarrier, 1);
      ptx::fence_mbarrier_init();  // the initialised mbarrier, before the cluster hears of it
      const int list_bytes = 32 * kPerLane * static_cast<int>(sizeof(Candidate));
      ptx::mbarrier_arrive_expect_tx(mbarrier, kClusterSize * list_bytes + (kHasState ? 32 * sizeof(State) : 0));
    }
  }
  List list(queues + warp * kQueue, static_cast<int>(params.k));

  // The tiles of this warp's parts, one after the other; `tile` is the first column of one. Where all of a tile is
  // inside the row, no column is compared with its ends.
  const unsigned parts = static_cast<unsigned>(params.row.parts), warps = splits * kWarpsPerRow;
  unsigned part = exists ? split * kWarpsPerRow + warp % kWarpsPerRow : parts;
  long long tile = part * kTile - past;
  typename Op::template Loaded<kVec> loaded[kFragments];
  bool whole = false;
  const auto load = [&] {
    long long col = tile + lane * kVec;
    whole = tile >= 0 && tile + kTile <= end;
    if (whole) {
#pragma unroll
      for (int i = 0; i < kFragments; ++i, col += kStep) op.template load<true>(loaded[i], col, col, col + kVec);
    } else {
#pragma unroll
      for (int i = 0; i < kFragments; ++i, col += kStep) op.template load<true>(loaded[i], col, 0LL, end);
    }
  };
  State total = State::identity(), all = total;  // of the part, and of the parts that this lane merges
  if (part < parts) load();
  while (part < parts) {
    const unsigned this_part = part;
    const long long first_col = tile + lane * kVec;
    typename Op::template Items<kVec> items[kFragments];
    int used = kFragments;  // fragments that begin inside the row
    if (whole) {
#pragma unroll
      for (int j = 0; j < kFragments; ++j) op.unpack(items[j], loaded[j], 0, 0, kVec);  // known to be inside
    } else {
#pragma unroll
      for (int j = 0; j < kFragments; ++j) op.unpack(items[j], loaded[j], first_col + j * kStep, 0LL, end);
      used = static_cast<int>(min(end - first_col, kTile) + kStep - 1) / kStep;
    }
    // The next tile is in flight while this one is examined.
    tile += parts * kTile;
    if (tile >= end) {
      part += warps;
      tile = part * kTile - past;
    }
    const bool last = part >= parts;
    if (!last) load();

    const Key best = op.examine(items, used, total, first_col, kStep, list.kth);
    if constexpr (kHasState) {
      if (part != this_part) {
        total = total.template merge_group<32>(op.unit);
        if (kClusterSize == 1 && splits > 1) {
          if (lane == 0) ptx::st_global(static_cast<State*>(params.row.partial) + row * parts + this_part, total);
        } else if (lane == this_part % 32) {
          all = all.merge(total, op.unit);
        }
        total = State::identity();
      }
    }

    const Candidate head = Candidate::make(best, first_col > 0 ? first_col : 0);
    bool look = __any_sync(0xffffffff, head.beats(list.kth));
    if (look) {
      Key floor = 0;
      if constexpr (kWarpsPerRow > 1) {
        // All warps together have k elements that reach the least of their bounds.
        floor = group_min<kWarpsPerRow>(
            ptx::ld_shared_relaxed(bounds + warp / kWarpsPerRow * kWarpsPerRow + thread % kWarpsPerRow));
      }
      const int lanes = __popc(__ballot_sync(0xffffffff, head.beats(list.kth) && head.key() >= floor));
      look = lanes > 0;
      if (lanes > params.k) {
        // k elements reach the k-th best of these heads.
        Candidate heads[1] = {head};
        bitonic_sort<false>(heads);
        const Key reached = heads[0].shuffle(static_cast<int>(params.k) - 1).key();
        if (reached > Op::nothing()) floor = max(floor, reached);
      }
      if (look) {
#pragma unroll
        for (int j = 0; j < kFragments; ++j) {
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
            const long long col = first_col + j * kStep + e;
            const Candidate candidate = op.candidate(items[j], e, col);
            list.append(col >= 0 && col < end && candidate.key() >= floor && candidate.beats(list.kth), candidate);
          }
        }
      }
    }
    if (look || last) {
      list.drain(last);
      if constexpr (kWarpsPerRow > 1) {
        const Key reached = list.at(share).key();
        if (thread % 32 == 0) ptx::st_shared_relaxed(bounds + warp, reached);
      }
    }
  }

  // Merge over the warps of the row, then over its blocks: by the first of the cluster, or by topk_merge.
  if constexpr (kWarpsPerRow > 1) merge_lists<kQueue>(list, queues, kWarpsPerRow);
  // Whether this warp has merged the parts of this lane.
  const bool mine = lane % (kWarpsPerRow * kClusterSize) == split * kWarpsPerRow + warp % kWarpsPerRow;
  if constexpr (kClusterSize > 1) {
    ptx::cluster_arrive();  // releases this block's mbarrier and, with its queues read, the memory of the slots
    ptx::cluster_wait();    // the first block is ready to be sent to
    if (warp == 0) {
#pragma unroll
      for (int r = 0; r < kPerLane; ++r) {
        ptx::st_async(queues + split * kQueue + r * 32 + thread, list.best[r], mbarrier, 0);
      }
    }
    if constexpr (kHasState) {
      if (mine) ptx::st_async(states + lane, all, mbarrier, 0);
    }
    if (split != 0) return;
    ptx::mbarrier_wait_cluster(mbarrier, 0);  // the lists and states of all blocks are here
    if (warp < kClusterSize) list.load(queues + warp * kQueue);
    if constexpr (kHasState) all = ptx::ld_shared(states + lane);
    merge_lists<kQueue>(list, queues, kClusterSize);
  } else if (splits > 1) {
    if (thread < 32 && exists) {
      list.store(static_cast<Candidate*>(params.lists) + (row * splits + split) * params.k);
    }
    return;
  } else if constexpr (kHasState && kWarpsPerRow > 1) {
    if (mine) ptx::st_shared(states + lane, all);
    __syncthreads();  // the states of all lanes are written before any warp reads them
    all = ptx::ld_shared(states + lane);
  }
  total = all.template merge_group<32>(op.unit);
  if (thread < 32 && exists) store_selection(op, list.best, total);
}
