// What the kernels of attention_backward share. With P = exp(S - lse), and dO and dlse the gradients of out and lse:
//
//   D = rowsum(dO o O) - dlse;  dP = dO V^T;  dS = P o (dP - D)
//   dV = P^T dO;  dQ = scale (dS o chain) K;  dK = scale (dS o chain)^T Q;  dbias = dS
//
// `chain` is the derivative of the softcap, else 1; dS has that of a score expression as a factor (T. Dao,
// arXiv:2307.08691, algorithm 2, with every option). Nothing is added up by atomics: dK and dV of a block of keys are
// summed by one block, as dQ of a block of queries.
#pragma once

#include <attention/backward_params.cuh>
#include <attention/matmul.cuh>
#include <attention/scores.cuh>
#include <primitives/warp.cuh>
#include <ptx/smem.cuh>

// Of one query: lse, natural, and infinity where it sees no key or is padding, so that its P is 0; and D.
template <class Acc>
struct alignas(2 * sizeof(Acc)) RowStats {
  Acc lse, delta;
};

// Row of the statistics that query `row` of a sequence has. Each sequence begins at an even one, which 16 bytes can be
// copied from, and has room for an even number.
__device__ __forceinline__ long long stats_row(const AttentionBackwardParams& params, long long batch, long long head,
                                               int sequence, long long q_start, int row) {
  const bool ragged = params.attention.cu_seqlens_q != nullptr;
  const long long first = ragged ? (q_start + sequence + 1) / 2 * 2 : 0;
  return (batch * params.attention.heads + head) * params.stat_rows + first + row;
}

// Rows of the statistics of all heads.
__device__ __forceinline__ long long stats_rows(const AttentionBackwardParams& params) {
  const AttentionParams& a = params.attention;
  return (a.cu_seqlens_q != nullptr ? 1LL : a.batch) * a.heads * params.stat_rows;
}

// P of a score: exp(s - lse), and at most 1, which it exceeds because lse has been rounded: by much if scores are huge.
// NaN stays. lse: of kModified scores natural, else in units of ScoreBase, as s fold.
template <bool kModified, class Acc>
__device__ __forceinline__ Acc probability(Acc s, Acc fold, Acc lse) {
  const Acc x = kModified ? (s - lse) * fold : ::fma(s, fold, -lse);
  return ScoreBase<Acc>::exp(x > 0 ? Acc(0) : x);
}

// Sequence block.batch: where it begins, how long it is, and its bounds.
__device__ __forceinline__ void find_sequence(const AttentionParams& params, QueryBlock& block) {
  const int b = block.batch;
  block.q_start = block.k_start = 0;
  block.rows = params.q_rows;
  block.k_rows = params.k_rows;
  if (params.cu_seqlens_q != nullptr) {
    const Sequence queries = sequence_of(params.cu_seqlens_q, params.q_rows, b);
    const Sequence keys = sequence_of(params.cu_seqlens_k, params.k_rows, b);
    block.q_start = queries.start;
    block.rows = queries.rows;
    block.k_start = keys.start;
    block.k_rows = keys.rows;
  }
  find_bounds(params, block);
}

// A tile of Q, dO, K and V in shared memory, which is not loaded ahead.
template <class Op, int kWarps, int kKeys, int kDim, int kValueDim, bool kVector>
struct ScoreTile {
  using T = typename Op::Element;
  using Scores = typename Op::Acc[1][kKeys / 8][4];
  static constexpr int kRows = 16 * kWarps;

  T* smem;

  // S = Q K^T and dP = dO V^T of the queries from block.first on and the keys from `key` on, by all threads.
  __device__ __forceinline__ void multiply(const AttentionBackwardParams& params, const QueryBlock& block,
                                           const QueryBlock::Keys& keys, int key, Scores& s, Scores& dp) const {
    constexpr int kThreads = 32 * kWarps;
    const Tile<T, kRows, kDim> q{smem};
    const Tile<T, kRows, kValueDim> grad{smem + kRows * kDim};
    const Tile<T, kKeys, kDim> k{smem + kRows * (kDim + kValueDim)};
    const Tile<T, kKeys, kValueDim> v{k.base + kKeys * kDim};
    const AttentionParams& a = params.attention;
    const long long batch = a.cu_seqlens_q != nullptr ? 0 : block.batch, head = block.head, k_head = head / a.sharing;
    const long long first_row = block.q_start + block.first, first_key = block.k_start + key;
    const int rows = block.q_len - block.first, from = keys.begin - key, to = keys.end - key;
    __syncthreads();  // every thread has read what the tile takes the place of
    q.template load<kVector, kThreads>(row_of<const T>(a.q, a.q_stride, batch, head, first_row), a.q_stride[2],
                                       a.q_stride[3], 0, rows, a.head_dim);
    grad.template load<kVector, kThreads>(row_of<const T>(params.grad, params.grad_stride, batch, head, first_row),
                                          params.grad_stride[2], params.grad_stride[3], 0, rows, a.value_dim);
    k.template load<kVector, kThreads>(row_of<const T>(a.k, a.k_stride, batch, k_head, first_key), a.k_stride[2],
                                       a.k_stride[3], from, to, a.head_dim);
    v.template load<kVector, kThreads>(row_of<const T>(a.v, a.v_stride, batch, k_head, first_key), a.v_stride[2],
                                       a.v_stride[3], from, to, a.value_dim);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();  // every thread's part of the tile
    const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
    Op::template scores<kDim>(s, q, warp_row, k);
    Op::template scores<kValueDim>(dp, grad, warp_row, v);
  }
};

// A block of keys, `first` … of the keys of one sequence and head of K; `head` is that one.
struct KeyBlock : QueryBlock {
  // Key j is seen by the queries from first_query(j) to last_query(j) - 1.
  __device__ __forceinline__ int first_query(int j) const { return query(j - to + 1); }
  __device__ __forceinline__ int last_query(int j) const { return query(j - from + 1); }

  // The queries that some of `count` keys are seen by, and those that all of them are; tiles of kQueries begin at
  // multiples of kQueries.
  struct Queries {
    int begin, end, all_begin, all_end;
    int tiles, first;  // first: where the first tile begins
  };
  template <int kQueries>
  __device__ __forceinline__ Queries queries(int count) const {
    const int last = min(first + count, kv_len) - 1;
    const int begin = first_query(first), end = last < first ? 0 : last_query(last), tile = begin / kQueries * kQueries;
    const int tiles = end > begin ? (end - tile + kQueries - 1) / kQueries : 0;
    return {begin, end, first_query(last), last_query(first), tiles, tile};
  }

 private:
  __device__ __forceinline__ int query(long long i) const {
    return i < 0 ? 0 : i < q_len ? static_cast<int>(i) : q_len;
  }
};

// The `count` keys of this block: of all heads of K, `heads_in_l2` at a time, so that Q and dO that they share stay in
// L2; first the first keys, which most queries see where attention is causal. The heads begin with `first_unit`.
__device__ __forceinline__ bool find_key_block(const AttentionParams& params, int count, int heads, unsigned int index,
                                               KeyBlock& block, int first_unit = 0) {
  const unsigned int blocks = static_cast<unsigned int>(params.heads_in_l2) * params.row_blocks;
  const int base = static_cast<int>(index / blocks) * params.heads_in_l2;
  const int together = min(params.heads_in_l2, heads - base);
  const int unit = first_unit + base + static_cast<int>(index % blocks) % together;
  const int kv_heads = params.heads / params.sharing;
  int number = static_cast<int>(index % blocks) / together;
  block.head = unit % kv_heads;
  block.batch = unit / kv_heads % params.batch;
  block.q_start = block.k_start = 0;
  block.rows = params.q_rows;
  block.k_rows = params.k_rows;
  if (params.cu_seqlens_k != nullptr) {
    const bool found =
        is_ranked(params)
            ? find_ranked(params.cu_seqlens_k, params.batch, params.k_rows, count, number, block.batch, number)
            : find_ragged(params.cu_seqlens_k, params.batch, params.k_rows, count, number, block.batch, number);
    if (!found) return false;
    const Sequence keys = sequence_of(params.cu_seqlens_k, params.k_rows, block.batch);
    const Sequence queries = sequence_of(params.cu_seqlens_q, params.q_rows, block.batch);
    if (is_ranked(params)) number = blocks_of(keys, count) - 1 - number;  // most queries see the first keys
    block.k_start = keys.start;
    block.k_rows = keys.rows;
    block.q_start = queries.start;
    block.rows = queries.rows;
  }
  block.first = number * count;
  find_bounds(params, block);
  return true;
}

// The rows of a warp from accumulators to global memory, through its rows of a tile: `good` rows of the block times
// `factor`, zeros up to `rows`.
template <int kMTiles, int kDTiles, class T, class Acc, class OutTile>
__device__ __forceinline__ void store_gradient(const Acc (&acc)[kMTiles][kDTiles][4], Acc factor, OutTile tile,
                                               int warp_row, int good, int rows, T* out, long long row_stride,
                                               long long col_stride, int columns, bool vector) {
  const int lane = static_cast<int>(lane_index());
#pragma unroll
  for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + lane / 4 + 16 * i + 8 * half;
#pragma unroll
      for (int d = 0; d < kDTiles; ++d) {
        Fragment<T, 2> pair;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          pair.element[e] = from_acc<T>(row < good ? acc[i][d][2 * half + e] * factor : Acc(0));
        }
        ptx::st_shared(reinterpret_cast<Fragment<T, 2>*>(tile.at(row, 8 * d + lane % 4 * 2)), pair);
      }
    }
  }
  __syncwarp();  // the rows of this warp are whole
  for (int index = lane; index < 16 * kMTiles * OutTile::kChunks; index += 32) {
    using Chunk = typename OutTile::Chunk;
    const int row = warp_row + index / OutTile::kChunks, column = index % OutTile::kChunks;
    const int left = row < rows ? columns - column * OutTile::kPerChunk : 0;
    if (left <= 0) continue;
    const Chunk values = ptx::ld_shared(reinterpret_cast<const Chunk*>(tile.chunk(row, column)));
    store_left(out + row * row_stride + column * OutTile::kPerChunk * col_stride, values, left, col_stride, vector);
  }
}
