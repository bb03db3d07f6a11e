// The best keys of each query and the sum of exponentials of all that it sees, without the matrix of scores: the loop
// of attention/forward.cuh with a selection in the place of V. Online softmax: Milakov & Gimelshein, arXiv:1805.02867.
//
//   Q -> shared memory
//   for each tile of keys that a row of the block sees:
//     S = Q K^T;  scale, softcap, bias, masks
//     m' = max(m, rowmax S);  l = l exp(m - m') + rowsum exp(S - m')
//     rows whose rowmax S beats their last list element: scores that do -> queue of the row
//     a queue that is full: sort, merge into the list of the row
//   list, m, l -> result; or, where blocks share a row, -> workspace
//
// kWarps warps have 16 rows each; block b has rows b % (blocks of rows) and part b / (blocks of rows) of the keys. K
// passes through a ring of kSlots tiles in shared memory; S, m and l stay in registers, lists and queues in shared
// memory. A tile in which no row finds anything costs the maximum that m needs, one comparison per row and one vote. In
// the first pass every row has at most count <= 32 kPerLane keys; later passes (kMostInPass) leave out what is not
// beaten by the last one of the pass before. Hidden keys and scores of -inf are never selected; NaN comes after
// numbers.
#pragma once

#include <attention/matmul.cuh>
#include <attention/scores.cuh>
#include <attention/topk_rows.cuh>
#include <ptx/smem.cuh>

template <class Op, int kWarps, int kKeys, int kDim, int kSlots, int kPerLane, bool kVector, class Bias, bool kMasked>
__global__ void __launch_bounds__(32 * kWarps, 1) attention_topk(const __grid_constant__ AttentionTopKParams params) {
  using T = typename Op::Element;
  using Acc = typename Op::Acc;
  using Candidate = typename ScoreCandidate<Acc>::Type;
  using List = WarpList<Candidate, kPerLane>;
  using State = SoftmaxState<Acc>;
  constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps, kNTiles = kKeys / 8;
  constexpr int kFull = 32, kQueue = kFull - 1 + kKeys;  // a queue that is not full has room for a tile
  using QTile = Tile<T, kRows, kDim>;
  using KTile = Tile<T, kKeys, kDim>;
  const AttentionParams& p = params.attention;
  const Acc infinity = Limits<Acc>::infinity();

  const unsigned int blocks = static_cast<unsigned int>(p.batch) * p.heads * p.row_blocks;
  QueryBlock block;
  if (!find_block(p, kRows, p.batch * p.heads, blockIdx.x % blocks, block)) return;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(lane_index());
  const int warp_row = 16 * warp, row0 = block.first + warp_row + lane / 4;  // and row0 + 8
  const bool works = block.first + warp_row < block.q_len;
  const long long first_row = (static_cast<long long>(block.batch) * p.heads + block.head) * p.q_rows;
  const T* q = row_of<const T>(p.q, p.q_stride, block.batch, block.head, block.first);
  const T* k = row_of<const T>(p.k, p.k_stride, block.batch, block.head / p.sharing, 0);

  // Parts of the keys, first_part to end_part of this block, and the tiles of them that a row sees.
  const int split = static_cast<int>(blockIdx.x / blocks), share = (params.parts + params.splits - 1) / params.splits;
  const int first_part = min(split * share, params.parts), end_part = min(first_part + share, params.parts);
  const QueryBlock::Keys keys = block.keys<kKeys>(kRows);
  const auto begin_of = [&](int part) {  // the first key of a part, as far as a row sees any from there on
    return static_cast<int>(min(static_cast<long long>(part) * params.part, static_cast<long long>(keys.end)));
  };
  const int begin = max(keys.begin, begin_of(first_part)), end = begin_of(end_part);
  const int first_key = begin / kKeys * kKeys, tiles = end > begin ? (end - first_key + kKeys - 1) / kKeys : 0;

  T* smem = ptx::dynamic_smem<T>();
  const QTile q_tile{smem};
  T* ring = smem + kRows * kDim;
  Candidate* lists = reinterpret_cast<Candidate*>(ring + kSlots * kKeys * kDim) + warp_row * 32 * kPerLane;
  Candidate* queues = lists + (kRows - warp_row) * 32 * kPerLane + warp_row * kQueue;
  const auto load = [&](int j) {
    const int key = first_key + j * kKeys;
    if (j < tiles) {
      KTile{ring + j % kSlots * kKeys * kDim}.template load<kVector, kThreads>(
          k + key * p.k_stride[2], p.k_stride[2], p.k_stride[3], keys.begin - key, keys.end - key, p.head_dim);
    }
    ptx::cp_async_commit();  // one group per tile, empty at the end, so that waits can count them
  };
  if (tiles > 0) {
    q_tile.template load<kVector, kThreads>(q, p.q_stride[2], p.q_stride[3], 0, block.q_len - block.first,
                                            p.head_dim);  // lands with the first group
  }
#pragma unroll
  for (int j = 0; j < kSlots - 1; ++j) load(j);
  for (int e = lane; e < 16 * 32 * kPerLane; e += 32) ptx::st_shared(lists + e, Candidate::none());

  const ScoreRule<true, Bias, kMasked, Acc> rule(p, block, block.head);
  const int list_size = max(params.count, 1);
  State part[2], total[2];     // of this lane's columns in a part; of parts, see kSums
  Candidate kth[2], bound[2];  // the list's last; the last of the pass before
  Acc limit[2] = {-infinity, -infinity}, ceiling[2] = {infinity, infinity};  // these as numbers
  int queued[2] = {0, 0};                                                    // candidates in the row's queue
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    part[half] = total[half] = State::identity();
    kth[half] = Candidate::none();
    bound[half] = Candidate::make(~typename Candidate::Key(0), 0);  // beats every key
    const int row = row0 + 8 * half;
    if (params.first > 0 && row < block.rows) {
      bound[half] = ptx::ld_global(params.bounds_of<Candidate>(params.first / kMostInPass - 1) + first_row + row);
      ceiling[half] = bound[half].key() == 0 ? -infinity : sorted_value<Acc>(bound[half].key(), Acc(1));
    }
  }

  // Sorts the queues of rows that have `least` candidates or more, and merges them into their lists.
  const auto drain = [&](int least) {
    // Bit 4 g is row g, bit 4 g + 1 row g + 8.
    const bool of_half = (lane % 2 == 0 ? queued[0] : queued[1]) >= least;
    for (unsigned int rows = __ballot_sync(0xffffffff, of_half && lane % 4 < 2); rows != 0; rows &= rows - 1) {
      const int leader = __ffs(rows) - 1, is_upper = leader % 4, row = leader / 4 + 8 * is_upper;
      List list(queues + row * kQueue, list_size);
      list.load(lists + row * 32 * kPerLane);
      list.kth = list.at(list_size - 1);
      list.count = __shfl_sync(0xffffffff, is_upper == 1 ? queued[1] : queued[0], leader);
      list.drain(true);
      list.save(lists + row * 32 * kPerLane);
      const Acc last = list.kth.key() == 0 ? -infinity : sorted_value<Acc>(list.kth.key(), Acc(1));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (lane / 4 == leader / 4 && half == is_upper) {
          kth[half] = list.kth, limit[half] = last, queued[half] = 0;
        }
      }
    }
  };

  const auto score = [&](int j, auto edge) {
    constexpr bool kEdge = decltype(edge)::kValue;
    const int key = first_key + j * kKeys;
    // S = Q K^T, scale, softcap, bias, masks
    Acc s[1][kNTiles][4] = {};
    Op::template scores<kDim>(s, q_tile, warp_row, KTile{ring + j % kSlots * kKeys * kDim});
    bool found = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 8 * half;
      const int low = kEdge ? block.low(row) : 0, high = kEdge ? block.high(row) : 0;
      Acc best = -infinity;
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int col = key + 8 * n + lane % 4 * 2 + e;
          bool visible = row < block.q_len && (!kEdge || (col >= low && col < high));
          if constexpr (kMasked) visible = visible && rule.allowed(row, col);
          Acc& t = s[0][n][2 * half + e];
          t = visible ? rule.score(t, row, col) : -infinity;
          best = max_number(best, t);
        }
      }

      // m' = max(m, rowmax S), l = l exp(m - m') + rowsum exp(S - m')
      if (best > part[half].m) part[half] = {best, part[half].rescaled(best, Acc(1))};
      const Acc shift = shift_of(part[half].m);
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) part[half].l += exp_natural(s[0][n][2 * half + e] - shift);
      }
      if (params.first > 0) {
        best = -infinity;
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const Acc t = s[0][n][2 * half + e];
            if (t <= ceiling[half]) best = max_number(best, t);
          }
        }
      }
      found = found || best > limit[half] || part[half].l != part[half].l;  // a NaN hides in l
    }

    // Scores that beat the last of their row's list -> queue; full queues -> lists
    if (__any_sync(0xffffffff, found)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const Acc t = s[0][n][2 * half + e];
            const Candidate candidate = Candidate::make(sort_key(t, Acc(1)), key + 8 * n + lane % 4 * 2 + e);
            const bool wants = t != -infinity && candidate.beats(kth[half]) && bound[half].beats(candidate);
            const unsigned int quad = __ballot_sync(0xffffffff, wants) >> (lane & 28) & 15;
            const int place = queued[half] + __popc(quad & ((1u << lane % 4) - 1));
            if (wants) ptx::st_shared(queues + (lane / 4 + 8 * half) * kQueue + place, candidate);
            queued[half] += __popc(quad);
          }
        }
      }
      drain(kFull);
    }
  };

  // The sum of part `number` joins those of the row, or goes to the workspace.
  const auto close = [&](int number) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const State sum = part[half].template merge_group<4>(Acc(1));
      part[half] = State::identity();
      const int row = row0 + 8 * half;
      if (params.splits == 1) {
        if (lane % AttentionTopKParams::kSums == number % AttentionTopKParams::kSums) {
          total[half] = total[half].merge(sum, Acc(1));
        }
      } else if (lane % 4 == 0 && row < block.rows) {
        ptx::st_global(static_cast<State*>(params.states) + (first_row + row) * params.parts + number, sum);
      }
    }
  };

  int number = first_part;  // of the part
  for (int j = 0; j < tiles; ++j) {
    const int key = first_key + j * kKeys;
    for (; number < key / params.part; ++number) close(number);  // the parts before this tile have ended
    ptx::cp_async_wait<kSlots - 2>();                            // this thread's part of tile j has landed
    __syncthreads();  // every thread's part; and every warp has read tile j - 1, whose slot is next
    load(j + kSlots - 1);
    if (!works) continue;
    if (key >= keys.all_begin && key + kKeys <= keys.all_end) {
      score(j, Constant<false>());
    } else {
      score(j, Constant<true>());
    }
  }
  for (; number < end_part; ++number) close(number);
  ptx::cp_async_wait<0>();
  drain(1);

  for (int i = 0; i < 16; ++i) {
    const int half = i / 8, leader = i % 8 * 4, row = block.first + warp_row + i;
    State sum = half == 0 ? total[0] : total[1];
    sum = sum.template merge_group<AttentionTopKParams::kSums>(Acc(1));
    sum = {__shfl_sync(0xffffffff, sum.m, leader), __shfl_sync(0xffffffff, sum.l, leader)};
    List list(queues, list_size);
    list.load(lists + i * 32 * kPerLane);
    if (row >= block.rows) break;  // equal over the warp
    if (params.splits == 1) {
      store_best<T>(params, first_row + row, list.best, sum);
    } else {
      list.store(static_cast<Candidate*>(params.lists) + ((first_row + row) * params.splits + split) * params.count);
    }
  }
}
