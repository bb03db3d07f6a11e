// softmax(scale Q K^T) V of a block of query rows, keys in tiles: FlashAttention-2, arXiv:2307.08691, algorithm 1.
//
//   Q -> shared memory
//   for each tile of keys that a row of the block sees:           (with a block mask, of those that it lists)
//     S = Q K^T;  softcap, bias, masks                              (masks only where the tile has an edge)
//     m' = max(m, rowmax S), where that grew much;  P = exp(S - m');  O = O exp(m - m'), l likewise
//     O += P V;  l += rowsum P
//   out = O / l;  lse = m + log l
//
// kWarps warps have 16 kMTiles rows each. S, P and O stay in registers; Q is in shared memory, and K and V tiles pass
// through a ring there: K0 V0 K1 V1 …, kSlots at a time, kSlots - 1 of them in flight. Of wide heads a K comes in parts
// of kPartDim columns, one after another. Columns are padded with zeros to kDim and kValueDim in the ring only; a block
// has kValueDim columns of `out`. kVector: K, Q and V move in chunks of 16 bytes (cp.async); else by element.
//
// NaN in K or V that no query sees stays out: hidden keys are loaded as zeros or, in tiles of a mask, zeroed.
#pragma once

#include <attention/key_tiles.cuh>
#include <attention/matmul.cuh>
#include <primitives/warp.cuh>
#include <ptx/smem.cuh>

template <class Op, int kWarps, int kMTiles, int kKeys, int kDim, int kPartDim, int kValueDim, int kSlots, bool kVector,
          bool kModified, class Bias, bool kMasked, class Tiles, class Score>
__global__ void __launch_bounds__(32 * kWarps, 1)
    attention_forward(const __grid_constant__ typename Tiles::Params all_params) {
  const AttentionParams& params = Tiles::attention(all_params);
  using T = typename Op::Element;
  using Acc = typename Op::Acc;
  using Base = ScoreBase<Acc>;
  constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps * kMTiles;
  constexpr int kNTiles = kKeys / 8, kDTiles = kValueDim / 8;
  static_assert(kKeys % 16 == 0 && kKeys <= 64, "whole mma tiles; a word of 64 bits has a bit for each key");
  static_assert(kDim % kPartDim == 0, "whole parts");
  using QTile = Tile<T, kRows, kPartDim>;  // and so is each part of Q
  using KTile = Tile<T, kKeys, kPartDim>;
  using VTile = Tile<T, kKeys, kValueDim>;
  using OutTile = Tile<T, kRows, kValueDim>;
  constexpr bool kLazy = sizeof(Acc) == 4 || kDim + kValueDim <= 320;           // larger tiles would spill
  constexpr int kParts = kDim / kPartDim, kSteps = kParts + 1;                  // of a tile of keys: K, then V
  constexpr int kSlot = (kPartDim > kValueDim ? kPartDim : kValueDim) * kKeys;  // elements

  const int heads = params.batch * params.heads;  // ragged: every head finds its sequence by itself
  const int units = params.cu_seqlens_q != nullptr ? params.heads : heads;
  const unsigned int blocks = static_cast<unsigned int>(units) * params.row_blocks;
  const int first_column = static_cast<int>(blockIdx.x / blocks) * kValueDim;
  QueryBlock block;
  if (!find_block(params, kRows, units, blockIdx.x % blocks, block)) return;

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(lane_index());
  const int warp_row = warp * 16 * kMTiles;
  const int columns = min(kValueDim, params.value_dim - first_column);
  const long long q_batch = params.cu_seqlens_q != nullptr ? 0 : block.batch, head = block.head;
  const long long k_head = head / params.sharing;
  const T* q = row_of<const T>(params.q, params.q_stride, q_batch, head, block.q_start + block.first);
  const T* k = row_of<const T>(params.k, params.k_stride, q_batch, k_head, block.k_start);
  const T* v =
      row_of<const T>(params.v, params.v_stride, q_batch, k_head, block.k_start) + first_column * params.v_stride[3];

  const QueryBlock::Keys keys = block.keys<kKeys>(kRows);
  const Tiles tiles(all_params, block, keys, kKeys);

  T* smem = ptx::dynamic_smem<T>();
  T* ring = smem + kRows * kDim;
  const auto load = [&](int step) {  // of each tile the parts of K, then V
    T* slot = ring + step % kSlots * kSlot;
    if (step < kSteps * tiles.end) {
      const int key = tiles.key(step / kSteps), from = keys.begin - key, to = keys.end - key;
      if (const int column = step % kSteps * kPartDim; column < kDim) {
        const T* rows = k + key * params.k_stride[2] + column * params.k_stride[3];
        KTile{slot}.template load<kVector, kThreads>(rows, params.k_stride[2], params.k_stride[3], from, to,
                                                     params.head_dim - column);
      } else {
        VTile{slot}.template load<kVector, kThreads>(v + key * params.v_stride[2], params.v_stride[2],
                                                     params.v_stride[3], from, to, columns);
      }
    }
    ptx::cp_async_commit();  // one group per step, empty at the end, so that waits can count them
  };
  // Step `step` has landed for every warp, and every warp is done with the step before: its slot is loaded again.
  const auto advance = [&](int step) {
    ptx::cp_async_wait<kSlots - 2>();  // all groups but those of the next steps: this thread's part of `step`
    __syncthreads();                   // every thread's part; and every warp has read step - 1
    load(step + kSlots - 1);
  };
  for (int part = 0; part < (tiles.begin < tiles.end ? kParts : 0); ++part) {
    const int column = part * kPartDim;
    QTile{smem + part * kRows * kPartDim}.template load<kVector, kThreads>(
        q + column * params.q_stride[3], params.q_stride[2], params.q_stride[3], 0, block.q_len - block.first,
        params.head_dim - column);  // lands with the first group
  }
#pragma unroll
  for (int step = 0; step < kSlots - 1; ++step) load(kSteps * tiles.begin + step);

  const ScoreRule<kModified, Bias, kMasked, Acc, Score> rule(params, block, block.head);
  const Acc fold = Base::kUnit * (kModified ? Acc(1) : static_cast<Acc>(params.scale));
  const int row0 = block.first + warp_row + lane / 4;  // of fragment element 0; elements 2 and 3 are 8 further down
  Acc o[kMTiles][kDTiles][4] = {};
  Acc l[kMTiles][2] = {};  // of this lane's columns unless Op::kSumsRows
  RowShift<Acc> shift[kMTiles][2];

  const auto attend = [&](int j, int key, auto edge) {  // edge: some row does not see all keys
    constexpr bool kEdge = decltype(edge)::kValue, kHides = kMasked && (kEdge || !Tiles::kListed);
    // S = Q K^T
    int step = kSteps * j;
    Acc s[kMTiles][kNTiles][4] = {};
#pragma unroll 1
    for (int part = 0; part < kRows * kDim; part += kRows * kPartDim, ++step) {  // of Q, which begins here
      advance(step);
      Op::template scores<kPartDim>(s, QTile{smem + part}, warp_row, KTile{ring + step % kSlots * kSlot});
    }

    // Softcap, bias, masks.
    [[maybe_unused]] unsigned long long seen = 0;  // by this lane's rows: bit c is key c of the tile
    [[maybe_unused]] const bool partial = kHides && tiles.is_partial(j);
    if constexpr (kModified || kEdge || kHides) {
#pragma unroll
      for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row0 + 16 * i + 8 * half;
          const int low = kEdge ? block.low(row) : 0, high = kEdge ? block.high(row) : 0;
#pragma unroll
          for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int c = 8 * n + lane % 4 * 2 + e, col = key + c;
              bool visible = !kEdge || (col >= low && col < high);
              if constexpr (kHides) {
                visible = visible && row < block.q_len && (!partial || tiles.allowed(rule, row, col));
                seen |= static_cast<unsigned long long>(visible) << c;
              }
              Acc& score = s[i][n][2 * half + e];
              score = visible ? rule.score(score, row, col) : -Limits<Acc>::infinity();
            }
          }
        }
      }
    }

    // V; in masked tiles the rows of V that no query of the block sees become zeros.
    unsigned long long* seen_by = ptx::static_smem<unsigned long long, kMasked ? kWarps : 1>();
    if constexpr (kHides) {
#pragma unroll
      for (int delta = 16; delta > 0; delta /= 2) seen |= __shfl_xor_sync(0xffffffff, seen, delta);
      if (lane == 0) ptx::st_shared(seen_by + warp, seen);
    }
    advance(step);  // V, and with kHides every warp's `seen`
    const VTile v_tile{ring + step % kSlots * kSlot};
    if constexpr (kHides) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) seen |= ptx::ld_shared(seen_by + w);
      for (int index = static_cast<int>(threadIdx.x); index < kKeys * VTile::kChunks; index += kThreads) {
        const int row = index / VTile::kChunks;
        if ((seen >> row & 1) == 0) {
          using Chunk = typename VTile::Chunk;
          ptx::st_shared(reinterpret_cast<Chunk*>(v_tile.chunk(row, index % VTile::kChunks)), Chunk{});
        }
      }
      __syncthreads();  // the zeros, before any warp multiplies with them
    }

    // m' = max(m, rowmax S); where that grew much, O and l are rescaled.
    Acc best[kMTiles][2];
    bool grew = false;
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        best[i][half] = -Limits<Acc>::infinity();
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) best[i][half] = max_number(best[i][half], s[i][n][2 * half + e]);
        }
        best[i][half] = group_max<4>(best[i][half]);
        grew = grew || shift[i][half].exceeded(best[i][half]);
      }
    }
    if (!kLazy || __any_sync(0xffffffff, grew)) {
      bool far = kLazy;
#pragma unroll
      for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Acc rescale = shift[i][half].move(best[i][half], fold);
          far = far || shift[i][half].far();
          l[i][half] *= rescale;
#pragma unroll
          for (int d = 0; d < kDTiles; ++d) {
            o[i][d][2 * half] *= rescale;
            o[i][d][2 * half + 1] *= rescale;
          }
        }
      }
      if (kLazy || __any_sync(0xffffffff, far)) {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
          for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) s[i][n][e] -= shift[i][e / 2].center;
          }
        }
      }
    }

    // P = exp(S - m'), l += rowsum P
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          Acc& p = s[i][n][e];
          p = Base::exp(::fma(p, fold, -shift[i][e / 2].base));
          if constexpr (!Op::kSumsRows) l[i][e / 2] += p;
        }
      }
    }

    // O += P V, and l where the product adds up rows of P, too.
    Op::values(o, l, s, v_tile);
  };
  for (int j = tiles.begin; j < tiles.end; ++j) {
    const int key = tiles.key(j);
    const bool inside = key >= keys.all_begin && key + kKeys <= keys.all_end;
    if (inside && !(Tiles::kListed && tiles.is_partial(j))) {
      attend(j, key, Constant<false>());
    } else {
      attend(j, key, Constant<true>());
    }
  }

  ptx::cp_async_wait<0>();
  __syncthreads();  // nothing is in flight to the ring, and every warp has read its last tile: `out` takes their place
  const OutTile out_tile{smem};
  const Acc infinity = Limits<Acc>::infinity();
#pragma unroll
  for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Acc total = l[i][half], weight = 1, m = shift[i][half].log_unit(kModified ? 1 : static_cast<Acc>(params.scale));
      if constexpr (!Op::kSumsRows) total = group_sum<4>(total);
      if (params.sinks != nullptr) {
        weight = shift[i][half].join(ptx::ld_global(static_cast<const Acc*>(params.sinks) + head), m, total);
      }
      const int row = row0 + 16 * i + 8 * half;
      const bool padding = row >= block.q_len;
      if (params.lse != nullptr && first_column == 0 && lane % 4 == 0 && row < block.rows) {
        const Acc lse = padding ? -infinity : (m == -infinity ? Acc(0) : m) + log_natural(total);
        ptx::st_global(static_cast<Acc*>(params.lse) + q_batch * params.lse_stride[0] + head * params.lse_stride[1] +
                           (block.q_start + row) * params.lse_stride[2],
                       lse);
      }
      const bool nothing = padding || total == 0;
      const Acc inverse = weight / total;
#pragma unroll
      for (int d = 0; d < kDTiles; ++d) {
        const int column = 8 * d + lane % 4 * 2;
        Fragment<Acc, 2> sums;
        Fragment<T, 2> pair;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Acc sum = o[i][d][2 * half + e];
          // Equal values stay exact only if they are divided by what they were added up with.
          sums.element[e] = nothing ? Acc(0) : Op::kSumsRows ? sum * weight / total : sum * inverse;
          pair.element[e] = from_acc<T>(sums.element[e]);
        }
        if (sizeof(T) < sizeof(Acc) && params.out_is_float) {  // a quad of lanes has whole sectors
          Acc* ptr = row_of<Acc>(params.out, params.out_stride, q_batch, head, block.q_start + row) +
                     (first_column + column) * params.out_stride[3];
          store_left(ptr, sums, row < block.rows ? columns - column : 0, params.out_stride[3], params.out_is_vector);
        } else {
          ptx::st_shared(reinterpret_cast<Fragment<T, 2>*>(out_tile.at(row - block.first, column)), pair);
        }
      }
    }
  }
  if (sizeof(T) < sizeof(Acc) && params.out_is_float) return;
  __syncwarp();  // the rows of this warp are whole
  T* out = row_of<T>(params.out, params.out_stride, q_batch, head, block.q_start + block.first) +
           first_column * params.out_stride[3];
  for (int index = lane; index < 16 * kMTiles * OutTile::kChunks; index += 32) {
    using Chunk = typename OutTile::Chunk;
    const int row = warp_row + index / OutTile::kChunks, column = index % OutTile::kChunks;
    const int left = block.first + row < block.rows ? columns - column * OutTile::kPerChunk : 0;
    if (left <= 0) continue;
    const Chunk values = ptx::ld_shared(reinterpret_cast<const Chunk*>(out_tile.chunk(row, column)));
    T* ptr = out + row * params.out_stride[2] + column * OutTile::kPerChunk * params.out_stride[3];
    store_left(ptr, values, left, params.out_stride[3], params.out_is_vector);
  }
}
